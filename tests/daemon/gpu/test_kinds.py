from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.daemon.gpu.conftest import BUDGET, CHUNK
from tierd.gpu.kinds import KINDS, make_device

if TYPE_CHECKING:
    from tierd.gpu.device import Kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_becomes_a_device_of_that_kind(kind: Kind) -> None:
    device = make_device(kind, 3, CHUNK, BUDGET)
    assert (device.kind, device.number, device.chunk_bytes) == (kind, 3, CHUNK)
    assert device.elastic == (kind != "cuda_ipc")
    assert device.backed_bytes == device.unpinned_bytes == 0


@pytest.mark.parametrize("kind", ["cuda_vmm", "cuda_ipc"])
def test_a_gpu_is_as_fast_as_it_is(kind: Kind) -> None:
    with pytest.raises(ValueError, match=f"copies of {kind} are as fast as"):
        make_device(kind, 0, CHUNK, BUDGET, copy_bandwidth=1)
    with pytest.raises(ValueError, match=f"copies of {kind} are as fast as"):
        make_device(kind, 0, CHUNK, BUDGET, copy_latency_us=1)


def test_no_gpu_library_is_loaded_before_a_device_is_opened() -> None:
    program = (
        "import sys; from tierd.gpu.kinds import KINDS, make_device; "
        "[make_device(kind, 0, 2 << 20, 2 << 20) for kind in KINDS]; "
        "sys.exit(any(name.split('.')[0] in ('cuda', 'cupy', 'torch') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
