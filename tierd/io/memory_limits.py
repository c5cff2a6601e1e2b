"""How much memory may still be taken: by the machine, and by every memory cgroup above us.

A cgroup that is full does not refuse memory, it kills. So the budget is held against these limits
before the first page is touched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tierd.errors import BudgetTooLarge, BudgetTooSmall
from tierd.io.pages import PageKind, free_hugetlb_bytes
from tierd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd.io.pages import Pages

_UNLIMITED_V1 = 1 << 62  # v1 says "no limit" as a number near 2^63, rounded to a page
_ROOT = Path("/")

AUTO_SHARE = 2  #: `--dram auto` takes one part in this many of what is available
AUTO_GRANULE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Limit:
    """`nbytes` can still be taken before `text` (the machine, or a cgroup by path) is exhausted."""

    nbytes: int
    text: str


def available_bytes(root: Path = _ROOT) -> Limit:
    """The tightest of the machine's MemAvailable and every limit of our memory cgroups.

    File cache that the kernel can drop counts as available, in a cgroup as in the machine.
    root: where /proc and /sys are looked up (tests).
    """
    return min(_limits(root), key=lambda limit: limit.nbytes)


def available_for(pages: Pages, root: Path = _ROOT) -> Limit:
    """How much arenas of such pages may still take. Reserved 2 MiB pages are no part of what the
    machine or a memory cgroup has left, and there are no more of them than were reserved."""
    if pages.kind is PageKind.HUGETLB:
        return Limit(free_hugetlb_bytes(root), "reserved 2 MiB pages: HugePages_Free")
    return available_bytes(root)


def check_least(budget_bytes: int, page_bytes: int) -> None:
    """Raise BudgetTooSmall where the budget does not hold one page."""
    if budget_bytes < page_bytes:
        raise BudgetTooSmall(
            f"the DRAM budget of {_exact(budget_bytes)} is below one page, {_exact(page_bytes)}: "
            f"no layer would fit"
        )


def check_budget(budget_bytes: int, limit: Limit, *, held_bytes: int = 0) -> None:
    """Raise BudgetTooLarge unless the budget fits into what is available.

    held_bytes: what arenas of an earlier daemon hold already; that is not taken a second time.
    """
    if budget_bytes - held_bytes > limit.nbytes:
        already = f", {_exact(held_bytes)} of it held already" if held_bytes else ""
        raise BudgetTooLarge(
            f"the DRAM budget of {_exact(budget_bytes)}{already} is above what is available: "
            f"{_exact(limit.nbytes)} ({limit.text})"
        )


def auto_budget(limit: Limit, *, held_bytes: int = 0) -> int:
    """The budget that `--dram auto` stands for: half of what is available, in whole 2 MiB.

    Half, because the model processes beside the daemon need theirs: runtime, activations, caches.
    Raises BudgetTooLarge when that is nothing.
    """
    share = (limit.nbytes + held_bytes) // AUTO_SHARE
    budget = share - share % AUTO_GRANULE_BYTES
    if budget == 0:
        raise BudgetTooLarge(
            f"no DRAM budget can be chosen: half of {_exact(limit.nbytes)} ({limit.text}) "
            f"is below {_exact(AUTO_GRANULE_BYTES)}"
        )
    return budget


def _exact(nbytes: int) -> str:
    return f"{format_size(nbytes)} ({nbytes} bytes)" if nbytes >= 1024 else format_size(nbytes)


def _limits(root: Path) -> Iterator[Limit]:
    available = _fields(root / "proc/meminfo")["MemAvailable:"] * 1024
    yield Limit(available, "the machine: MemAvailable in /proc/meminfo")
    for version, directory, top in _memory_cgroups(root):
        for group in (directory, *directory.parents):
            yield from _limits_v1(group) if version == 1 else _limits_v2(group)
            if group == top:
                break


def _limits_v1(group: Path) -> Iterator[Limit]:
    limit = _number(group / "memory.limit_in_bytes")
    if limit is None or limit >= _UNLIMITED_V1:
        return
    used = _number(group / "memory.usage_in_bytes") or 0
    stat = _fields(group / "memory.stat")
    cache = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
    yield _left(group, "memory.limit_in_bytes", limit, used, cache)


def _limits_v2(group: Path) -> Iterator[Limit]:
    for name in ("memory.max", "memory.high"):
        limit = _number(group / name)
        if limit is None:
            continue
        used = _number(group / "memory.current") or 0
        stat = _fields(group / "memory.stat")
        cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
        yield _left(group, name, limit, used, cache)


def _left(group: Path, name: str, limit: int, used: int, cache: int) -> Limit:
    # Both numbers come from separate files of counters that lag: cache may exceed usage.
    in_use = max(0, used - cache)
    text = f"memory cgroup {group}: {name} {format_size(limit)}, {format_size(in_use)} in use"
    return Limit(max(0, limit - in_use), text)


def _memory_cgroups(root: Path) -> Iterator[tuple[int, Path, Path]]:
    """(version, our directory, the mount's top directory) for each hierarchy that limits memory.

    In a container the mount shows only a part of the tree: its root field is cut off our path;
    where that does not lead to a directory, the mount's top is the lowest group that we can see.
    """
    paths = dict(_memberships(root))
    for version, mount_root, mount_point in _mounts(root):
        path = paths.get(version)
        if path is None:
            continue
        if mount_root != "/" and (path == mount_root or path.startswith(mount_root + "/")):
            path = path[len(mount_root) :]
        top = root / mount_point.lstrip("/")
        directory = Path(os.path.normpath(top / path.lstrip("/")))
        if not directory.is_relative_to(top) or not directory.is_dir():
            directory = top
        yield version, directory, top


def _memberships(root: Path) -> Iterator[tuple[int, str]]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            yield 2, path
        elif "memory" in controllers.split(","):
            yield 1, path


def _mounts(root: Path) -> Iterator[tuple[int, str, str]]:
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        mount_root, mount_point = (_unescape(field) for field in before.split()[3:5])
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2":
            yield 2, mount_root, mount_point
        elif kind == "cgroup" and "memory" in options.split(","):
            yield 1, mount_root, mount_point


def _unescape(field: str) -> str:
    """mountinfo writes blank, tab, newline and backslash as \\ooo."""
    for octal in ("040", "011", "012", "134"):
        field = field.replace("\\" + octal, chr(int(octal, 8)))
    return field


def _number(path: Path) -> int | None:
    """None where there is no such file (the root group, a foreign hierarchy) or it says "max"."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        return None
    return None if text == "max" else int(text)


def _fields(path: Path) -> dict[str, int]:
    """The first two columns of a file like memory.stat or meminfo."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) >= 2}
