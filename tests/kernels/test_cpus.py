"""The default number of threads is what the machine really gives to this process."""

import os
from pathlib import Path

import pytest

from tierd_kernels.cpus import default_threads


@pytest.fixture
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.usefixtures("eight_processors")
def test_without_cgroups_the_affinity_mask_counts(tmp_path: Path) -> None:
    assert default_threads(tmp_path) == 8


@pytest.mark.usefixtures("eight_processors")
@pytest.mark.parametrize(
    ("quota", "threads"),
    [("max", 8), ("300000", 3), ("250000", 2), ("50000", 1), ("1600000", 8)],
)
def test_a_version_2_quota_of_an_ancestor_counts_rounded_down(
    tmp_path: Path, quota: str, threads: int
) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/outer/inner\n")
    write(tmp_path / "sys/fs/cgroup/outer/cpu.max", f"{quota} 100000\n")
    write(tmp_path / "sys/fs/cgroup/outer/inner/cpu.max", "max 100000\n")
    assert default_threads(tmp_path) == threads


@pytest.mark.usefixtures("eight_processors")
@pytest.mark.parametrize(("quota", "threads"), [("-1", 8), ("200000", 2)])
def test_a_version_1_quota_counts(tmp_path: Path, quota: str, threads: int) -> None:
    write(tmp_path / "proc/self/cgroup", "4:memory:/x\n3:cpu,cpuacct:/job\n0::/\n")
    write(tmp_path / "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", f"{quota}\n")
    write(tmp_path / "sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000\n")
    assert default_threads(tmp_path) == threads


@pytest.mark.usefixtures("eight_processors")
def test_in_a_namespace_the_root_of_the_mount_counts(tmp_path: Path) -> None:
    """In a container the path that /proc names is often not there; the limit is at the top."""
    write(tmp_path / "proc/self/cgroup", "0::/kubepods/pod/abc\n")
    write(tmp_path / "sys/fs/cgroup/cpu.max", "400000 100000\n")
    assert default_threads(tmp_path) == 4


def test_here_it_is_at_least_one_and_at_most_the_processors() -> None:
    assert 1 <= default_threads() <= len(os.sched_getaffinity(0))
