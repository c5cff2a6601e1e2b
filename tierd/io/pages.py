"""Which kind of memory page the machine gives for an arena, and what a choice means.

2 MiB pages make direct reads into the arena about twice as fast and six times cheaper, and a
client's first touch of it nearly free. Two ways lead there; where neither is open, 4 KiB pages
serve, and the daemon says so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SMALL_PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20

_ROOT = Path("/")
_THP = "sys/kernel/mm/transparent_hugepage"
#: Values of shmem_enabled under which a mapping that asks by madvise gets huge pages.
_THP_OPEN = ("always", "within_size", "advise", "force")


class PageKind(Enum):
    HUGETLB = "hugetlb"  #: reserved by the operator (vm.nr_hugepages)
    SHMEM_THP = "shmem-thp"  #: transparent, on request by madvise
    SMALL = "4KiB"


@dataclass(frozen=True, slots=True)
class Pages:
    """The choice, made once for all arenas: the granule of the budget is the same in each."""

    kind: PageKind
    text: str  #: for `tierctl status`
    warning: str | None = None

    @property
    def page_bytes(self) -> int:
        """The unit in which memory is taken and given back: the core's granule."""
        return SMALL_PAGE_BYTES if self.kind is PageKind.SMALL else HUGE_PAGE_BYTES


def choose_pages(budget_bytes: int, root: Path = _ROOT, *, kept_fds: Sequence[int] = ()) -> Pages:
    """hugetlb when enough of it is free for the whole budget, else transparent, else 4 KiB.

    kept_fds: arenas of an earlier daemon. A memfd of hugetlb pages stays one and no other becomes
    one, so they decide about hugetlb. root: where /proc and /sys are looked up (tests).
    """
    free = free_hugetlb_bytes(root)
    if any(is_hugetlb(fd) for fd in kept_fds) or (free >= budget_bytes and not kept_fds):
        return Pages(PageKind.HUGETLB, "2 MiB pages (hugetlb)")
    state = shmem_huge_state(root)
    if state in _THP_OPEN:
        return Pages(PageKind.SHMEM_THP, f"2 MiB pages (shmem THP, shmem_enabled={state})")
    return Pages(
        PageKind.SMALL,
        "4 KiB pages",
        warning=(
            f"4 KiB pages: reads cost several times the CPU that they would with 2 MiB pages. "
            f"/{_THP}/shmem_enabled is {state!r} (needed: advise), and "
            f"{free // HUGE_PAGE_BYTES} free hugetlb pages of 2 MiB do not cover "
            f"{-(-budget_bytes // HUGE_PAGE_BYTES)}; see systemd/tierd.tmpfiles.conf"
        ),
    )


def is_hugetlb(fd: int) -> bool:
    """Whether the memfd is made of reserved 2 MiB pages; one of shmem says 4096 here."""
    return os.fstat(fd).st_blksize == HUGE_PAGE_BYTES


def shmem_huge_state(root: Path = _ROOT) -> str:
    """The setting that decides about 2 MiB pages of a memfd; "never" on a kernel without them."""
    overall = _bracketed(root / _THP / "shmem_enabled")
    if overall in ("deny", "force"):  # these overrule the setting of a size
        return overall
    own = _bracketed(root / _THP / "hugepages-2048kB/shmem_enabled")  # Linux 6.11
    return (overall if own in (None, "inherit") else own) or "never"


def _bracketed(path: Path) -> str | None:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    return text[text.index("[") + 1 : text.index("]")]


def free_hugetlb_bytes(root: Path = _ROOT) -> int:
    """Of reserved 2 MiB pages, what nobody has and nobody was promised."""
    fields = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0])
    if fields.get("Hugepagesize") != HUGE_PAGE_BYTES >> 10:
        return 0
    # Reserved pages are counted as free, but belong to mappings that exist.
    return (fields["HugePages_Free"] - fields["HugePages_Rsvd"]) * HUGE_PAGE_BYTES
