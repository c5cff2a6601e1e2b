"""What ncu counts becomes rows that say what binds a kernel: with a tool that is played."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tierd_tools import gpu_profiled, profiler
from tierd_tools.bench import gpu_profile
from tierd_tools.gpu_acceptance.promises import PROFILE
from tierd_tools.gpu_ground import Ground
from tierd_tools.gpu_matrices import KernelGround
from tierd_tools.profiler import METRICS, Profile, ProfilerFailed

if TYPE_CHECKING:
    from pathlib import Path

HEADING = ["ID", "Kernel Name", *METRICS.values()]
UNITS = ["", "", "ns", "%", "%", "%", "%", "inst", "register/thread"]


def record(number: int, dram: str, issue: str) -> list[str]:
    return [
        str(number), "multiply_tiles", "31,200", dram, issue, "40.5", "62", "12,345,678", "96",
    ]  # fmt: skip


def csv_of(*records: list[str]) -> str:
    return "\n".join(",".join(f'"{cell}"' for cell in line) for line in (HEADING, UNITS, *records))


@pytest.fixture
def ncu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One on PATH that says what `said` in its folder has, and ends with `status`."""
    monkeypatch.setattr(gpu_profile, "ground", lambda: Ground("cuda_vmm", None))
    path = tmp_path / "ncu"
    path.write_text(
        f"#!/bin/sh\necho '==PROF== Connected'; cat {tmp_path}/said; exit $(cat {tmp_path}/status)"
    )
    path.chmod(0o755)
    (tmp_path / "status").write_text("0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return path


def say(ncu: Path, text: str, status: int = 0) -> None:
    ncu.with_name("said").write_text(text)
    ncu.with_name("status").write_text(str(status))


def test_counters_are_read_from_between_other_lines() -> None:
    found = profiler.read("a program said\n" + csv_of(record(0, "81.5", "33")) + "\n==PROF== done")
    assert found == [Profile("multiply_tiles", 31.2, 81.5, 33.0, 40.5, 62.0, 12345678.0, 96.0)]
    assert found[0].binds == (
        "bytes: DRAM 82 %, issue slots 33 %, L1 40 %, warps 62 % of the most, 96 registers, "
        "12.3 M warp instructions in 31.2 us"
    )


def test_a_kernel_that_uses_nothing_up_is_bound_by_latency() -> None:
    (found,) = profiler.read(csv_of(record(0, "31.5", "53")))
    assert found.binds.startswith("latency (nothing is above 70 %; issue slots come first): ")


def test_every_kernel_of_the_promises_has_its_counters(ncu: Path) -> None:
    say(ncu, csv_of(*(record(number, "20", f"{70 + number}") for number in range(len(PROFILE)))))
    rows = gpu_profile.run(["-c", "pass"])
    assert [row.ours for row in rows] == [70 + number for number in range(len(PROFILE))]
    assert {row.theirs for row in rows} == {20.0}
    assert all(str(row.binds).startswith("issue slots: ") for row in rows)


@pytest.mark.parametrize(
    ("said", "status", "reason"),
    [
        ("==ERROR== LibraryNotLoaded", 1, "ended with 1 and said: ==ERROR== LibraryNotLoaded"),
        ("no kernels", 0, "ended with 0 and said: no kernels"),
        (csv_of(record(0, "20", "70")), 0, "saw 1 launches, 6 were made: multiply_tiles"),
    ],
)
def test_a_profiler_that_sees_something_else_is_no_measurement(
    said: str, status: int, reason: str, ncu: Path
) -> None:
    say(ncu, said, status)
    rows = gpu_profile.run(["-c", "pass"])
    assert all(reason in str(row.not_applicable) for row in rows)
    assert {row.met for row in rows} == {None}


def test_a_profiler_that_hangs_is_ended(ncu: Path) -> None:
    ncu.write_text("#!/bin/sh\nexec sleep 60")
    with pytest.raises(ProfilerFailed, match="did not end within 1 s"):
        profiler.profile(ncu, ["-c", "pass"], "any", 1.0)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here")
def test_the_program_that_is_watched_launches_a_kernel_for_each_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_profiled, "CASES", gpu_profiled.CASES[1:4:2])
    assert gpu_profiled.launch(KernelGround(None, shapes=((64, 64),))) == 2


def test_rows_and_launches_are_the_same_ones_in_the_same_order() -> None:
    named = [f"{way} {codec} " for way, codec in gpu_profiled.CASES]
    assert len(named) == len(PROFILE)
    assert all(name in promise.row for name, promise in zip(named, PROFILE, strict=True))
