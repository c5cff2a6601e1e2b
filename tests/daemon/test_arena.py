from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tierd.errors import ArenaError
from tierd.io.arena import Arena, Obtained, sum_smaps
from tierd.io.pages import PageKind, Pages, shmem_huge_state

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
SPAN = 1 << 40  # a thousand times this machine's memory
SMALL = Pages(PageKind.SMALL, "4 KiB pages")
HUGETLB = Pages(PageKind.HUGETLB, "2 MiB pages (hugetlb)")


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create(3, SPAN, "tierd-test", pages=SMALL)
    yield made
    made.close()


def test_a_span_of_a_tebibyte_costs_nothing_until_it_is_touched(arena: Arena) -> None:
    assert (arena.span_bytes, arena.populated_bytes) == (SPAN, 0)
    far = arena.buffer(SPAN - 4096, 4096)
    far[0] = 1
    assert arena.populated_bytes == 4096


def test_populating_takes_exactly_the_range_and_keeps_what_is_there(arena: Arena) -> None:
    arena.buffer(8 * MIB, 5)[:] = b"first"
    arena.populate_step(8 * MIB, 4 * MIB)
    assert arena.populated_bytes == 4 * MIB
    assert bytes(arena.buffer(8 * MIB, 6)) == b"first\0"


def test_discarding_gives_exactly_the_range_back(arena: Arena) -> None:
    arena.populate_step(0, 4 * MIB)
    arena.buffer(MIB - 1, 1)[0] = arena.buffer(MIB, 1)[0] = arena.buffer(3 * MIB, 1)[0] = 7
    arena.discard(MIB, 2 * MIB)
    assert arena.populated_bytes == 2 * MIB
    seen = [arena.buffer(at, 1)[0] for at in (MIB - 1, MIB, 3 * MIB)]
    assert seen == [7, 0, 7]


def test_discarding_what_was_never_touched_is_nothing(arena: Arena) -> None:
    arena.discard(0, SPAN)
    assert arena.populated_bytes == 0


def test_a_reader_sees_what_is_written_later_and_cannot_write(arena: Arena) -> None:
    reader = mmap.mmap(arena.readonly_fd, 2 * MIB, prot=mmap.PROT_READ)
    arena.buffer(MIB, 4)[:] = b"seen"
    assert reader[MIB : MIB + 4] == b"seen"
    with pytest.raises(PermissionError):
        mmap.mmap(arena.readonly_fd, 2 * MIB, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(arena.readonly_fd, b"x")
    reader.close()


def test_nobody_can_cut_the_memory_away_under_a_reader(arena: Arena) -> None:
    for size in (0, SPAN - 4096, SPAN + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert os.fstat(arena.fd).st_mode & 0o777 == 0o600
    assert not os.get_inheritable(arena.fd)
    assert not os.get_inheritable(arena.readonly_fd)


def test_an_adopted_arena_holds_what_the_earlier_one_did() -> None:
    first = Arena.create(0, SPAN, "tierd-test", pages=SMALL)
    first.buffer(6 * MIB, 4)[:] = b"warm"
    kept = os.dup(first.fd)
    first.close()
    second = Arena.adopt(5, kept, pages=SMALL)
    assert (second.arena_id, second.span_bytes, second.populated_bytes) == (5, SPAN, 4096)
    assert bytes(second.buffer(6 * MIB, 4)) == b"warm"
    second.buffer(6 * MIB, 4)[:] = b"more"
    second.discard(6 * MIB, 4096)
    assert second.populated_bytes == 0
    second.close()


def test_only_a_sealed_memfd_is_adopted_and_a_refused_one_stays_open() -> None:
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    empty = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(
        empty, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    )
    pipe, other = os.pipe()
    for fd, text in ((unsealed, "is not sealed"), (empty, "has 0 bytes"), (pipe, "is no memfd")):
        with pytest.raises(ArenaError, match=f"descriptor {fd} {text}.*arena 1"):
            Arena.adopt(1, fd)
        os.close(fd)  # would fail if it had been closed
    os.close(other)


def test_an_arena_of_small_pages_is_not_adopted_as_hugetlb(arena: Arena) -> None:
    kept = os.dup(arena.fd)
    with pytest.raises(ArenaError, match=r"arena 3 was not made for 2 MiB pages \(hugetlb\)"):
        Arena.adopt(3, kept, pages=HUGETLB)
    os.close(kept)


@pytest.mark.parametrize("span", [0, -1, MIB, 2 * MIB + 1])
def test_a_span_that_is_not_whole_huge_pages_is_refused(span: int) -> None:
    with pytest.raises(ValueError, match=f"not {span} bytes"):
        Arena.create(0, span, "x")


def test_a_span_above_the_address_space_is_an_error_that_leaks_nothing() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ArenaError, match=f"arena 0: {1 << 60} bytes of address space"):
        Arena.create(0, 1 << 60, "x", pages=SMALL)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(-4096, 4096), (0, 0), (0, SPAN + 4096), (SPAN, 4096)]
)
def test_a_range_outside_the_span_is_refused_with_its_numbers(
    arena: Arena, offset: int, nbytes: int
) -> None:
    for act in (arena.buffer, arena.populate_step, arena.discard):
        with pytest.raises(ValueError, match=rf"\[{offset}, {offset + nbytes}\).*arena 3.*{SPAN}"):
            act(offset, nbytes)


def test_memory_is_taken_and_given_back_by_whole_pages(arena: Arena) -> None:
    for act in (arena.populate_step, arena.discard):
        for offset, nbytes in ((1, 4096), (0, 4095)):
            with pytest.raises(ValueError, match="pages of 4096 bytes"):
                act(offset, nbytes)


def test_it_does_not_close_under_a_buffer() -> None:
    made = Arena.create(0, 2 * MIB, "x", pages=SMALL)
    buffer = made.buffer(0, 10)
    with pytest.raises(BufferError):
        made.close()
    buffer.release()
    made.close()


def test_what_was_obtained_is_counted_from_the_page_tables(arena: Arena) -> None:
    assert arena.measure() == Obtained(0, 0)
    assert arena.measure().text == "nothing populated yet"
    arena.populate_step(0, 4 * MIB)
    obtained = arena.measure()
    assert obtained.resident_bytes == 4 * MIB
    if shmem_huge_state() == "never":  # small pages were asked for, but "always" overrules
        assert obtained.huge_bytes == 0


def test_mappings_that_advice_or_locks_split_are_added_up() -> None:
    text = """\
        1000-2000 rw-s 00000000 00:01 1 /memfd:a (deleted)
        Rss:                  64 kB
        ShmemPmdMapped:        0 kB
        VmFlags: rd wr sh
        200000-400000 rw-s 00000000 00:01 7 /memfd:b c (deleted)
        Rss:                2048 kB
        ShmemPmdMapped:     2048 kB
        400000-800000 rw-s 00200000 00:01 7 /memfd:b c (deleted)
        Rss:                2048 kB
        ShmemPmdMapped:        0 kB
        800000-900000 rw-p 00000000 00:00 0
        Rss:                   4 kB
        ShmemPmdMapped:        4 kB
    """
    found = sum_smaps(textwrap.dedent(text).splitlines(), 0x200000, 0x800000)
    assert found == Obtained(resident_bytes=4 * MIB, huge_bytes=2 * MIB)
    assert found.text == "50 % in 2 MiB pages"


def test_hugetlb_pages_are_counted_although_the_kernel_keeps_them_out_of_rss() -> None:
    lines = ["200000-600000 rw-s 0 00:01 7 /anon_hugepage", "Rss: 0 kB", "Shared_Hugetlb: 2048 kB",
             "Private_Hugetlb: 2048 kB"]  # fmt: skip
    assert sum_smaps(lines, 0x200000, 0x600000) == Obtained(4 * MIB, 4 * MIB)


def test_a_locked_arena_counts_what_exists_and_one_that_is_not_says_why(arena: Arena) -> None:
    if arena.lock_note:
        assert "CAP_IPC_LOCK" in arena.lock_note
    arena.populate_step(0, MIB)
    assert arena.locked_bytes == (0 if arena.lock_note else MIB)
    free = Arena.create(0, 2 * MIB, "x", pages=SMALL, mlock=False)
    free.populate_step(0, MIB)
    assert (free.locked_bytes, free.lock_note) == (0, "mlock is off")
    free.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_a_user_who_may_not_lock_is_served_and_told_why() -> None:
    script = f"""
        import os, resource
        from tierd.io.arena import Arena
        from tierd.io.pages import Pages, PageKind
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
        os.setuid(65534)
        arena = Arena.create(0, {SPAN}, "x", pages=Pages(PageKind.SMALL, "4 KiB pages"))
        arena.populate_step(0, {MIB})
        print(arena.lock_note)
        assert arena.locked_bytes == 0 and arena.populated_bytes == {MIB}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert "needs CAP_IPC_LOCK, or RLIMIT_MEMLOCK unlimited, which is 65536 bytes" in done.stdout


def test_no_memory_is_an_error_that_names_the_range() -> None:
    """A file size limit stands in for a machine that has nothing left."""
    script = f"""
        import resource
        from tierd.errors import ArenaError
        from tierd.io.arena import Arena
        resource.setrlimit(resource.RLIMIT_FSIZE, ({MIB}, {MIB}))
        try:
            Arena.create(4, {SPAN}, "x")
        except ArenaError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert f"arena 4: a memfd of {SPAN} bytes was refused" in done.stdout


def test_hugetlb_without_reserved_pages_fails_when_populated_and_kills_nobody() -> None:
    try:
        made = Arena.create(6, 1 << 30, "x", pages=HUGETLB)
    except ArenaError as error:
        pytest.skip(str(error))
    try:
        assert made.page_bytes == 2 * MIB
        assert made.lock_note is None
        if int(Path("/proc/sys/vm/nr_hugepages").read_text()):
            pytest.skip("this machine has reserved huge pages")
        with pytest.raises(ArenaError, match=r"arena 6: MADV_POPULATE_WRITE of \[0, 2097152\)"):
            made.populate_step(0, 2 * MIB)
    finally:
        made.close()


def test_2_mib_pages_are_asked_for_and_obtained_where_the_system_permits_them() -> None:
    state = shmem_huge_state()
    made = Arena.create(0, SPAN, "x", pages=Pages(PageKind.SHMEM_THP, "2 MiB pages"))
    try:
        assert made.page_bytes == 2 * MIB
        made.populate_step(4 * MIB, 8 * MIB)
        assert made.populated_bytes == 8 * MIB
        if state in ("never", "deny"):
            pytest.skip(f"shmem_enabled is {state}")
        assert made.measure() == Obtained(8 * MIB, 8 * MIB)
        made.discard(6 * MIB, 2 * MIB)
        assert made.populated_bytes == 6 * MIB
    finally:
        made.close()


def test_the_arena_is_left_out_of_core_dumps(arena: Arena) -> None:
    arena.populate_step(0, MIB)
    with open("/proc/self/smaps") as lines:
        text = lines.read()
    flags = text[text.index("/memfd:tierd-test") :].partition("VmFlags:")[2].splitlines()[0]
    assert "dd" in flags.split()
