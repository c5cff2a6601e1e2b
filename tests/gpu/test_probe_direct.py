"""Does a layer reach the GPU past DRAM (cuFile) on this node, and how fast?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.talk import Probe

if TYPE_CHECKING:
    from tests.gpu.conftest import Record

pytestmark = pytest.mark.gpu
NBYTES = 64 << 20


@pytest.mark.parametrize("kind", ["cuda_vmm", "cuda_ipc"])
def test_what_reading_past_dram_gives(kind: str, record: Record) -> None:
    """Refused aloud is an answer too: it is a choice, off by default."""
    file = Path("build/gpu/direct-probe").absolute()  # no tmpfs: cuFile reads from disks
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(os.urandom(NBYTES))
    try:
        with Probe("direct_read", kind, file) as probe:
            found = probe.hear()
    finally:
        file.unlink()
    question = f"Does a layer reach the GPU past DRAM ({kind})?"
    if "refused" in found:
        record(question, f"no: {found['refused']}")
        return
    assert (found["posix_reads"], found["direct_reads"] > 0) == (0, True)
    record(
        question,
        f"yes, {found['direct_reads']} direct reads; {found['read_gb_s']} GB/s read, "
        f"{found['verify_gb_s']} GB/s verified",
    )
