"""An arena: a memfd with an address span far larger than the budget, of which only the touched
part exists.

The core decides which ranges may be touched; here they are populated, given back, locked, counted.
The descriptor is sealed against resizing, so that no reader is ever killed by a truncation. It is
not sealed against writing: that would also forbid the owner to give memory back, and to map it
again after a restart. Clients get a descriptor that was opened for reading.
Every method that can take long (populate, discard, measure) releases the GIL and belongs in a
thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.errors import ArenaError
from tierd.io.pages import HUGE_PAGE_BYTES, PageKind, Pages, choose_pages, is_hugetlb

if TYPE_CHECKING:
    from collections.abc import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mlock2.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

# Not (all) in Python 3.11's modules; values from linux/uapi.
_MFD_NOEXEC_SEAL = 0x0008  # Linux 6.3
_MFD_HUGE_2MB = 21 << 26
_MAP_NORESERVE = 0x4000
_MADV_HUGEPAGE = 14
_MADV_DONTDUMP = 16
_MADV_POPULATE_WRITE = 23  # Linux 5.14
_MLOCK_ONFAULT = 0x01
_FALLOC_KEEP_SIZE_PUNCH_HOLE = 0x01 | 0x02
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_STAT_BLOCK_BYTES = 512


@dataclass(frozen=True, slots=True)
class Obtained:
    """What the kernel really gave for the daemon's mapping, from /proc/self/smaps."""

    resident_bytes: int
    huge_bytes: int  #: of these, mapped by 2 MiB pages

    @property
    def text(self) -> str:
        if self.resident_bytes == 0:
            return "nothing populated yet"
        return f"{100 * self.huge_bytes // self.resident_bytes} % in 2 MiB pages"


class Arena:
    """See the module. Owns the descriptors and the mapping; `close` needs all buffers released."""

    def __init__(self, arena_id: int, fd: int, pages: Pages, *, mlock: bool = True) -> None:
        """Maps an existing memfd; use `create` or `adopt`. Takes `fd` over, not on failure."""
        self.arena_id = arena_id
        self.fd = fd
        self.pages = pages
        self.span_bytes = os.fstat(fd).st_size
        try:
            self.readonly_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ArenaError(f"arena {arena_id}: no read-only descriptor: {error}") from error
        try:
            self._map = mmap.mmap(fd, self.span_bytes, flags=mmap.MAP_SHARED | _MAP_NORESERVE)
        except (OSError, ValueError) as error:
            os.close(self.readonly_fd)
            raise ArenaError(
                f"arena {arena_id}: {self.span_bytes} bytes of address space cannot be mapped: "
                f"{error}"
            ) from error
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._advise(0, self.span_bytes, _MADV_DONTDUMP, "MADV_DONTDUMP")
        if pages.kind is PageKind.SHMEM_THP:
            self._advise(0, self.span_bytes, _MADV_HUGEPAGE, "MADV_HUGEPAGE")
        #: Why memory of this arena may be swapped; None when it is locked.
        self.lock_note: str | None = self._lock() if mlock else "mlock is off"

    @classmethod
    def create(
        cls,
        arena_id: int,
        span_bytes: int,
        name: str,
        *,
        pages: Pages | None = None,
        mlock: bool = True,
    ) -> Arena:
        """A new empty arena. span_bytes: address space, a multiple of 2 MiB; costs no memory.

        pages: the choice made for the whole daemon (`choose_pages(budget)`).
        Raises ArenaError.
        """
        if span_bytes <= 0 or span_bytes % HUGE_PAGE_BYTES:
            raise ValueError(f"an arena spans whole 2 MiB, not {span_bytes} bytes")
        pages = pages or choose_pages(span_bytes)
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if pages.kind is PageKind.HUGETLB:
            flags |= os.MFD_HUGETLB | _MFD_HUGE_2MB
        try:
            fd = _memfd(name, flags)
        except OSError as error:
            raise ArenaError(f"arena {arena_id}: no memfd {name!r}: {error}") from error
        try:
            os.ftruncate(fd, span_bytes)
            os.fchmod(fd, 0o600)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(arena_id, fd, pages, mlock=mlock)
        except ArenaError:
            os.close(fd)
            raise
        except OSError as error:
            os.close(fd)
            raise ArenaError(
                f"arena {arena_id}: a memfd of {span_bytes} bytes was refused: {error}"
            ) from error

    @classmethod
    def adopt(
        cls, arena_id: int, fd: int, *, pages: Pages | None = None, mlock: bool = True
    ) -> Arena:
        """The arena of an earlier daemon, with what it holds. Takes `fd` over.

        A descriptor that is not a sealed memfd of ours raises ArenaError; then `fd` stays open
        and the caller's.
        """
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise ArenaError(f"descriptor {fd} is no memfd, not arena {arena_id}") from error
        if seals & _SEALS != _SEALS:
            raise ArenaError(f"descriptor {fd} is not sealed, not arena {arena_id}")
        stat = os.fstat(fd)
        if stat.st_size == 0 or stat.st_size % HUGE_PAGE_BYTES:
            raise ArenaError(f"descriptor {fd} has {stat.st_size} bytes, not arena {arena_id}")
        pages = pages or choose_pages(0, kept_fds=[fd])
        if is_hugetlb(fd) != (pages.kind is PageKind.HUGETLB):
            raise ArenaError(f"arena {arena_id} was not made for {pages.text}")
        return cls(arena_id, fd, pages, mlock=mlock)

    @property
    def address(self) -> int:
        """Where the daemon's mapping begins."""
        return self._address

    @property
    def page_bytes(self) -> int:
        return self.pages.page_bytes

    @property
    def pages_text(self) -> str:
        return self.pages.text

    @property
    def populated_bytes(self) -> int:
        """Memory that exists behind the arena, as the kernel counts it."""
        return os.fstat(self.fd).st_blocks * _STAT_BLOCK_BYTES

    def buffer(self, offset: int, nbytes: int) -> memoryview:
        """The writable bytes [offset, offset + nbytes). Touching them takes memory."""
        self._check_range(offset, nbytes)
        return memoryview(self._map)[offset : offset + nbytes]

    def populate_step(self, offset: int, nbytes: int) -> None:
        """Make the range exist: contents are kept, new pages are zero.

        In a thread, and in steps: a memory cgroup that runs full kills. Raises ArenaError when
        there is no memory for it.
        """
        self._check_pages(offset, nbytes)
        self._advise(offset, nbytes, _MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE")

    def discard(self, offset: int, nbytes: int) -> None:
        """Give the memory behind the range back to the system; it reads as zero afterwards."""
        self._check_pages(offset, nbytes)
        if _libc.fallocate(self.fd, _FALLOC_KEEP_SIZE_PUNCH_HOLE, offset, nbytes):
            raise self._failure("PUNCH_HOLE", offset, nbytes)

    @property
    def locked_bytes(self) -> int:
        """Memory of the arena that is never swapped."""
        return 0 if self.lock_note else self.populated_bytes

    def measure(self) -> Obtained:
        """What the kernel really gave. Walks the page tables of the whole process: on request
        only, and in a thread."""
        with open("/proc/self/smaps", encoding="utf-8") as lines:
            return sum_smaps(lines, self._address, self._address + self.span_bytes)

    def close(self) -> None:
        """Unmap and close. The memory is gone unless a client or systemd holds a descriptor.

        Raises BufferError while a buffer lives: a thread might still write into it.
        """
        self._map.close()
        os.close(self.readonly_fd)
        os.close(self.fd)

    def _lock(self) -> str | None:
        """Lock whatever will ever be touched: the whole span, but only on fault. Best effort.

        So a range that becomes warm by a read, long after population, is locked too.
        """
        if self.pages.kind is PageKind.HUGETLB:
            return None  # never swapped
        if _libc.mlock2(self._address, self.span_bytes, _MLOCK_ONFAULT) == 0:
            return None
        reason = os.strerror(ctypes.get_errno())
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return f"{reason}: needs CAP_IPC_LOCK, or RLIMIT_MEMLOCK unlimited, which is {soft} bytes"

    def _advise(self, offset: int, nbytes: int, advice: int, name: str) -> None:
        if _libc.madvise(self._address + offset, nbytes, advice):
            raise self._failure(name, offset, nbytes)

    def _failure(self, what: str, offset: int, nbytes: int) -> ArenaError:
        number = ctypes.get_errno()
        return ArenaError(
            f"arena {self.arena_id}: {what} of [{offset}, {offset + nbytes}) was refused: "
            f"{errno.errorcode.get(number, number)} ({os.strerror(number)})"
        )

    def _check_range(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes <= 0 or offset + nbytes > self.span_bytes:
            raise ValueError(
                f"[{offset}, {offset + nbytes}) is no range of arena {self.arena_id}, "
                f"which spans {self.span_bytes} bytes"
            )

    def _check_pages(self, offset: int, nbytes: int) -> None:
        self._check_range(offset, nbytes)
        if offset % self.page_bytes or nbytes % self.page_bytes:
            raise ValueError(
                f"[{offset}, {offset + nbytes}) of arena {self.arena_id} is not made of "
                f"pages of {self.page_bytes} bytes"
            )


def sum_smaps(lines: Iterable[str], first: int, end: int) -> Obtained:
    """Add up the mappings inside [first, end): advice and locks may have split ours."""
    inside = False
    totals = {"Rss:": 0, "ShmemPmdMapped:": 0, "Shared_Hugetlb:": 0, "Private_Hugetlb:": 0}
    for line in lines:
        words = line.split()
        if "-" in words[0]:
            low, high = (int(word, 16) for word in words[0].split("-"))
            inside = first <= low and high <= end
        elif inside and words[0] in totals:
            totals[words[0]] += int(words[1]) * 1024
    hugetlb = totals["Shared_Hugetlb:"] + totals["Private_Hugetlb:"]  # not part of Rss
    return Obtained(
        resident_bytes=totals["Rss:"] + hugetlb, huge_bytes=totals["ShmemPmdMapped:"] + hugetlb
    )


def _memfd(name: str, flags: int) -> int:
    try:
        return os.memfd_create(name, flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)  # a kernel before 6.3 does not know the flag
