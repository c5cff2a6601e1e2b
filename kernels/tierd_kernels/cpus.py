"""How many threads a kernel may use: the processors that this process really has."""

import os
from pathlib import Path


def default_threads(root: Path = Path("/")) -> int:
    """Processors in the affinity mask, lowered to the CPU quota of every enclosing cgroup.

    A quota is rounded down: a thread more than it pays for is throttled in the middle of a product,
    and all others wait for it. `root` is where /proc and /sys are looked for.
    """
    threads = len(os.sched_getaffinity(0))
    quotas = [*_quotas_v2(root), *_quotas_v1(root)]
    return max(1, min([threads, *(int(quota) for quota in quotas)]))


def _quotas_v2(root: Path) -> list[float]:
    quotas = []
    for folder in _ancestors(root, controller="", mount="sys/fs/cgroup"):
        words = _read(folder / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
    return quotas


def _quotas_v1(root: Path) -> list[float]:
    quotas = []
    for folder in _ancestors(root, controller="cpu", mount="sys/fs/cgroup/cpu"):
        quota = _read(folder / "cpu.cfs_quota_us").strip()
        period = _read(folder / "cpu.cfs_period_us").strip()
        if quota and period and int(quota) > 0:
            quotas.append(int(quota) / int(period))
    return quotas


def _ancestors(root: Path, *, controller: str, mount: str) -> list[Path]:
    """Folders of this process's cgroup and of all above it, for one hierarchy ("" is version 2)."""
    top = root / mount
    folders = [top]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(","):
            folder = top / path.lstrip("/")
            while folder != top and top in folder.parents:
                folders.append(folder)
                folder = folder.parent
    return folders


def _read(path: Path) -> str:
    """Text of a file that exists only on some systems; empty where it does not."""
    try:
        return path.read_text()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return ""
