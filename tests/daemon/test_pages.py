from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tierd.io.pages import PageKind, choose_pages, is_hugetlb, shmem_huge_state

if TYPE_CHECKING:
    from pathlib import Path

HUGE = 2 << 20


def machine(
    root: Path, *, thp: str | None, own: str | None = None, free: int = 0, reserved: int = 0
) -> Path:
    """A root directory with the kernel files that a choice looks at."""
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text(
        f"MemTotal: 1 kB\nHugePages_Free: {free}\nHugePages_Rsvd: {reserved}\n"
        "Hugepagesize:    2048 kB\n"
    )
    settings = root / "sys/kernel/mm/transparent_hugepage"
    (settings / "hugepages-2048kB").mkdir(parents=True)
    if thp:
        (settings / "shmem_enabled").write_text(f"always within_size [{thp}] x\n")
    if own:
        (settings / "hugepages-2048kB/shmem_enabled").write_text(f"always [{own}] x\n")
    return root


@pytest.mark.parametrize(
    ("thp", "own", "state"),
    [
        ("advise", None, "advise"),
        ("advise", "inherit", "advise"),
        ("never", "inherit", "never"),
        ("never", "advise", "advise"),
        ("advise", "never", "never"),
        ("deny", "always", "deny"),
        ("force", "never", "force"),
        (None, None, "never"),
    ],
)
def test_the_setting_of_2_mib_pages_wins_unless_the_overall_one_overrules_it(
    tmp_path: Path, thp: str | None, own: str | None, state: str
) -> None:
    assert shmem_huge_state(machine(tmp_path, thp=thp, own=own)) == state


@pytest.mark.parametrize("thp", ["always", "within_size", "advise", "force"])
def test_transparent_pages_are_used_where_the_system_permits_them(tmp_path: Path, thp: str) -> None:
    pages = choose_pages(4 << 30, machine(tmp_path, thp=thp))
    assert (pages.kind, pages.page_bytes, pages.warning) == (PageKind.SHMEM_THP, HUGE, None)
    assert thp in pages.text


@pytest.mark.parametrize("thp", ["never", "deny", None])
def test_without_huge_pages_the_warning_says_what_is_missing(
    tmp_path: Path, thp: str | None
) -> None:
    pages = choose_pages(10 * HUGE, machine(tmp_path, thp=thp, free=9))
    assert (pages.kind, pages.page_bytes) == (PageKind.SMALL, 4096)
    assert pages.warning is not None
    assert repr(thp or "never") in pages.warning
    assert "9 free hugetlb pages of 2 MiB do not cover 10" in pages.warning


def test_hugetlb_needs_the_whole_budget_to_be_free_and_not_promised(tmp_path: Path) -> None:
    root = machine(tmp_path, thp="advise", free=12, reserved=2)
    assert choose_pages(10 * HUGE, root).kind is PageKind.HUGETLB
    assert choose_pages(10 * HUGE + 1, root).kind is PageKind.SHMEM_THP


def test_a_kept_arena_of_shmem_rules_hugetlb_out(tmp_path: Path) -> None:
    root = machine(tmp_path, thp="never", free=100)
    fd = os.memfd_create("kept")
    try:
        assert not is_hugetlb(fd)
        assert choose_pages(HUGE, root, kept_fds=[fd]).kind is PageKind.SMALL
    finally:
        os.close(fd)


def test_a_kept_arena_of_hugetlb_stays_one_when_none_is_free(tmp_path: Path) -> None:
    try:
        fd = os.memfd_create("kept", os.MFD_HUGETLB)
    except OSError as error:
        pytest.skip(f"this kernel has no hugetlb memfd: {error}")
    try:
        assert is_hugetlb(fd)
        assert choose_pages(HUGE, machine(tmp_path, thp="never"), kept_fds=[fd]).kind is (
            PageKind.HUGETLB
        )
    finally:
        os.close(fd)


def test_this_machine_has_an_answer() -> None:
    pages = choose_pages(1 << 20)
    assert (pages.warning is None) == (pages.page_bytes == HUGE)
