"""Memory: the pages that an arena gets, whether it can be locked, what limits its size."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from tierd.errors import ArenaError
from tierd.io.arena import Arena
from tierd.io.memory_limits import available_bytes
from tierd.io.pages import HUGE_PAGE_BYTES, PageKind, choose_pages
from tierd.sizes import format_size
from tierd_tools.doctor.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

TRIAL_BYTES = 16 << 20
_CAP_IPC_LOCK = 14  # linux/capability.h
_ROOT = Path("/")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def findings(root: Path = _ROOT) -> Iterator[Finding]:
    """root: where /proc and /sys are looked up (tests)."""
    yield pages(root)
    yield locking(root)
    yield limit(root)
    yield shared_memory(root)


def pages(root: Path = _ROOT) -> Finding:
    """Takes a small arena and looks at the pages that it really got."""
    name = "2 MiB pages"
    chosen = choose_pages(TRIAL_BYTES, root)
    advice = (
        "as root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled (at every boot: "
        "systemd/tierd.tmpfiles.conf); direct reads are about twice as fast with 2 MiB pages"
    )
    try:
        arena = Arena.create(0, TRIAL_BYTES, "tierd-doctor", pages=chosen, mlock=False)
    except ArenaError as error:
        return Finding(name, "does not work", f"{chosen.text}: {error}", advice, needed=True)
    try:
        arena.populate_step(0, TRIAL_BYTES)
        obtained = arena.measure()
    except ArenaError as error:
        return Finding(
            name, "does not work", f"{format_size(TRIAL_BYTES)} of memory were refused: {error}",
            "free memory, or raise the limit of the cgroup (below)", needed=True,
        )  # fmt: skip
    finally:
        arena.close()
    if obtained.huge_bytes == obtained.resident_bytes:
        return Finding(name, "works", f"{chosen.text}: a trial arena got nothing else")
    if chosen.kind is PageKind.SMALL:
        free = chosen.warning or chosen.text
        return Finding(name, "does not work", free, advice)
    return Finding(
        name, "does not work",
        f"{chosen.text} are on, but a trial arena of {format_size(TRIAL_BYTES)} got "
        f"{format_size(obtained.huge_bytes)} in such pages",
        f"memory is fragmented: restart tierd early after boot, or reserve pages with "
        f"vm.nr_hugepages (budget / {format_size(HUGE_PAGE_BYTES)})",
    )  # fmt: skip


def locking(root: Path = _ROOT) -> Finding:
    """May this user lock memory, and does a trial mlock succeed?"""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    capable = _capable(root)
    said = (
        f"RLIMIT_MEMLOCK is {_limit(soft)} (at most {_limit(hard)}), "
        f"CAP_IPC_LOCK {'is held' if capable else 'is not held'}"
    )
    refused = _try_mlock(TRIAL_BYTES)
    unlimited = capable or soft == resource.RLIM_INFINITY
    said += f"; mlock of {format_size(TRIAL_BYTES)} {f'failed: {refused}' if refused else 'worked'}"
    if refused is None and unlimited:
        return Finding("pinning", "works", said)
    advice = (
        "run the service with LimitMEMLOCK=infinity (systemd/tierd.service), or a shell with "
        "`ulimit -l unlimited`; tierd serves without, but its memory may be swapped, and CUDA may "
        "refuse to register it"
    )
    if refused is None:
        advice = f"a budget above {_limit(soft)} cannot be locked: {advice}"
    return Finding("pinning", "does not work", said, advice)


def limit(root: Path = _ROOT) -> Finding:
    """What a budget may be at most, and who says so."""
    try:
        found = available_bytes(root)
    except (OSError, ValueError, KeyError) as error:
        return Finding("memory limit", "unknown", f"/proc and cgroups cannot be read: {error}")
    text = f"{format_size(found.nbytes)} can be taken ({found.text})"
    if found.nbytes >= HUGE_PAGE_BYTES:
        return Finding("memory limit", "works", text)
    return Finding(
        "memory limit", "does not work", text,
        "free memory, or raise memory.max of that cgroup", needed=True,
    )  # fmt: skip


def shared_memory(root: Path = _ROOT) -> Finding:
    """/dev/shm. Arenas are memfds, which its size does not limit; CUDA's and torch's sharing of
    events between processes is under it."""
    path = root / "dev/shm"
    try:
        stat = os.statvfs(path)
    except OSError as error:
        return Finding(
            "/dev/shm", "does not work", f"{error.strerror}; arenas do not need it",
            "mount a tmpfs there (containers: --shm-size): CUDA and torch share events through it",
        )  # fmt: skip
    total, free = stat.f_blocks * stat.f_frsize, stat.f_bavail * stat.f_frsize
    text = f"{format_size(free)} of {format_size(total)} are free; it does not limit arenas (memfd)"
    if free >= TRIAL_BYTES:
        return Finding("/dev/shm", "works", text)
    return Finding("/dev/shm", "does not work", text, "remove files from it, or enlarge it")


def _limit(nbytes: int) -> str:
    return "unlimited" if nbytes == resource.RLIM_INFINITY else format_size(nbytes)


def _capable(root: Path) -> bool:
    for line in (root / "proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
    return False


def _try_mlock(nbytes: int) -> str | None:
    """Why it was refused, None if it was not."""
    with mmap.mmap(-1, nbytes) as memory:
        anchor = ctypes.c_char.from_buffer(memory)
        try:
            if _libc.mlock(ctypes.addressof(anchor), nbytes) == 0:
                return None
            return os.strerror(ctypes.get_errno())
        finally:
            del anchor
