"""What registering a memfd with CUDA costs and gives (cuMemHostRegister), by kind of pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.gpu.talk import Probe
from tierd.io.pages import shmem_huge_state

if TYPE_CHECKING:
    from tests.gpu.conftest import Record

pytestmark = pytest.mark.gpu
NBYTES = 512 << 20
READ_ONLY = 8  # CU_MEMHOSTREGISTER_READ_ONLY


def missing(kind: str) -> str | None:
    """Why this machine has no such pages; a test changes no setting of the machine."""
    if kind == "thp" and shmem_huge_state() in ("never", "deny"):
        return f"shmem_enabled is {shmem_huge_state()}"
    if kind == "hugetlb":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("HugePages_Free:") and int(line.split()[1]) < NBYTES >> 21:
                return f"{line.split()[1]} free hugetlb pages, {NBYTES >> 21} needed"
    return None


@pytest.mark.parametrize(
    ("kind", "mode", "flags", "relied_on"),
    [
        ("4k", "rw", 0, True),
        ("thp", "rw", 0, True),
        ("hugetlb", "rw", 0, True),
        ("sealed", "rw", 0, False),
        ("4k", "ro", 0, False),
        ("4k", "ro", READ_ONLY, False),
        ("thp", "ro", READ_ONLY, False),
    ],
)
def test_what_registering_gives(
    kind: str, mode: str, flags: int, relied_on: bool, record: Record
) -> None:
    question = f"Can a memfd ({kind} pages, mapped {mode}, flags {flags}) be registered?"
    if reason := missing(kind):
        record(question, f"not asked: {reason}")
        pytest.skip(reason)
    with Probe("register", kind, mode, flags, NBYTES) as probe:
        found = probe.hear()
    if found["code"]:
        record(question, f"no: code {found['code']}; copies at {found['before']} GB/s")
    else:
        record(
            question,
            f"yes, {found['registered_ms'] * (1 << 30) / NBYTES:.0f} ms for each GiB (populated in "
            f"{found['populated_ms'] * (1 << 30) / NBYTES:.0f} ms); copies at {found['before']} "
            f"GB/s before, {found['after']} GB/s after",
        )
    if relied_on:
        assert found["code"] == 0


def test_what_the_driver_says_that_it_can(record: Record) -> None:
    with Probe("attributes") as probe:
        found = probe.hear()
    for name, value in found.items():
        record(f"CU_DEVICE_ATTRIBUTE_{name}?", value)
    assert found["HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"]
    assert found["VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"]
