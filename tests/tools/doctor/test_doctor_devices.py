"""Round trips between two processes, and what is said where there is no driver."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tierd.gpu.memfd_device import MemfdDevice
from tierd_tools.doctor import nvidia, round_trip

if TYPE_CHECKING:
    from tierd.gpu.device import Pending

LIBCUDA = """
int cuInit(unsigned flags) { (void)flags; return CODE; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
"""


class Damaging(MemfdDevice):
    """Copies something else than it was given."""

    def copy(self, arena: int, offset: int, source: memoryview) -> Pending:
        other = bytearray(source)
        other[-1] ^= 1
        return super().copy(arena, offset, memoryview(other))


def test_two_processes_see_the_same_bytes_over_the_border_of_two_chunks() -> None:
    found = round_trip.finding("memfd", 0, needed=True)
    assert found.verdict == "works"
    assert "0 bytes kept after giving back" in found.text


def test_bytes_that_arrive_differently_are_noticed() -> None:
    device = Damaging(0, round_trip.CHUNK_BYTES, 2 * round_trip.CHUNK_BYTES)
    try:
        with pytest.raises(OSError, match="other bytes than were copied"):
            round_trip._round_trip(device)
    finally:
        device.close()


def test_a_second_process_that_cannot_read_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Damaging, "kind", "no such kind")
    device = Damaging(0, round_trip.CHUNK_BYTES, 2 * round_trip.CHUNK_BYTES)
    try:
        with pytest.raises(OSError, match="KeyError"):
            round_trip._round_trip(device)
    finally:
        device.close()


def test_a_trial_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(round_trip, "LONGEST_SECONDS", 0.01)
    found = round_trip.finding("memfd", 0, needed=True)
    assert found.failed
    assert "no answer within 0.01 s" in found.text


def test_a_trial_that_crashes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = round_trip.finding("memfd", 0, needed=True)
    assert found.failed
    assert "ended with 1: it said nothing" in found.text


def libcuda(folder: Path, code: int) -> str:
    (folder / "cuda.c").write_text(LIBCUDA)
    library = folder / "libcuda.so.1"
    flags = ["-shared", "-fPIC", f"-DCODE={code}", "-o", str(library)]
    subprocess.run(["cc", *flags, str(folder / "cuda.c")], check=True)
    return str(library)


def test_a_driver_that_starts_says_its_version_and_gpus(tmp_path: Path) -> None:
    started = nvidia.ask_library(libcuda(tmp_path, 0))
    assert started == nvidia.Started(gpus=2, cuda=13000)
    (found,) = nvidia.findings(nvidia.Nvidia((0, 1), "580.95.05", started))
    assert found.verdict == "works"
    assert found.text == "580.95.05, CUDA 13.0, 2 GPUs"


def test_a_driver_that_does_not_start_is_needed_where_a_card_is(tmp_path: Path) -> None:
    started = nvidia.ask_library(libcuda(tmp_path, 803))
    (found,) = nvidia.findings(nvidia.Nvidia((0,), "580.95.05", started))
    assert found.failed
    assert "803" in found.text
    assert "library and kernel module differ" in found.text


def test_a_machine_without_a_card_is_no_failure() -> None:
    started = nvidia.ask_library("libcuda.so.no-such-version")
    (found,) = nvidia.findings(nvidia.Nvidia((), None, started))
    assert not found.failed
    assert "no NVIDIA GPU is visible here" in found.text


def test_cards_and_the_kernel_module_are_found_by_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    version = tmp_path / "proc/driver/nvidia/version"
    version.parent.mkdir(parents=True)
    version.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
    )
    monkeypatch.setattr(nvidia, "start", lambda: nvidia.Started(gpus=2, cuda=13000))
    found = nvidia.look(tmp_path)
    assert (found.nodes, found.module, found.problem) == ((0, 3), "580.95.05", None)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("cuda_vmm", "mapped for reading only"), ("cuda_ipc", "CUDA IPC cannot forbid writing")],
)
def test_the_round_trips_of_cuda_go_through_over_a_driver_that_is_played(
    monkeypatch: pytest.MonkeyPatch, kind: round_trip.Kind, said: str
) -> None:
    site = Path(__file__).parents[2] / "fake_cuda" / "site"
    monkeypatch.setenv("PYTHONPATH", str(site))
    found = round_trip.finding(kind, 0, needed=True)
    assert found.verdict == "works", found.text
    assert said in found.text
    missing = round_trip.finding(kind, 7, needed=True)
    assert missing.failed
    assert "gpu:7 does not exist" in missing.text
    assert missing.advice
