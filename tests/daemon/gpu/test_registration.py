from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.daemon.gpu.conftest import claim
from tierd.gpu.registration import PIECE_BYTES, HostMemory, Span

PIECE = 0x10000
BASE = 0x7F0000000000
PATIENCE_S = 20.0


@pytest.fixture
def host() -> HostMemory:
    host = HostMemory(PIECE)
    host.add_arena(0, BASE, 16 * PIECE)
    return host


def register(host: HostMemory, start: int, end: int) -> None:
    """As if a driver had registered [start, end), which lies in one piece."""
    pieces = claim(host, 0, start, end)
    (piece,) = pieces
    piece.registered = sorted([*piece.registered, (start, end)])
    host.give(pieces)


def test_pieces_are_far_below_what_one_call_of_the_driver_can_register() -> None:
    assert PIECE_BYTES == 256 << 20


def test_memory_that_is_not_registered_is_copied_in_one_call(host: HostMemory) -> None:
    host.populated(0, 0, 4 * PIECE)
    use = host.use(BASE + 100, 3 * PIECE)
    assert use.spans == [Span(BASE + 100, 3 * PIECE, pinned=False)]
    assert use.unpinned_bytes == 3 * PIECE
    use.end()


def test_memory_of_no_arena_is_copied_too(host: HostMemory) -> None:
    for address in (5, BASE - 1, BASE + 16 * PIECE):
        use = host.use(address, 10)
        assert use.spans == [Span(address, 10, pinned=False)]
        use.end()


def test_a_copy_is_cut_where_registrations_end(host: HostMemory) -> None:
    host.populated(0, 0, 3 * PIECE)
    register(host, 0, PIECE)
    register(host, PIECE, PIECE + 0x3000)
    register(host, PIECE + 0x8000, 2 * PIECE)
    use = host.use(BASE + PIECE - 0x1000, PIECE + 0x2000)
    assert use.spans == [
        Span(BASE + PIECE - 0x1000, 0x1000, pinned=True),
        Span(BASE + PIECE, 0x3000, pinned=True),
        Span(BASE + PIECE + 0x3000, 0x5000, pinned=False),
        Span(BASE + PIECE + 0x8000, 0x8000, pinned=True),
        Span(BASE + 2 * PIECE, 0x1000, pinned=False),
    ]
    assert use.unpinned_bytes == 0x6000
    use.end()


@given(
    st.lists(st.integers(0, 63), min_size=2, max_size=12, unique=True),
    st.integers(0, 62),
    st.integers(1, 63),
)
def test_the_parts_of_a_copy_make_it_up_and_are_all_in_one_registration_or_in_none(
    borders: list[int], start: int, nbytes: int
) -> None:
    host = HostMemory(16)
    host.add_arena(0, 1000, 64)
    host.populated(0, 0, 64)
    registered: list[tuple[int, int]] = []
    borders.sort()
    for first, last in zip(borders[::2], borders[1::2], strict=False):
        while first < last:  # no registration lies in two pieces
            end = min(last, (first // 16 + 1) * 16)
            pieces = claim(host, 0, first, end)
            pieces[0].registered = sorted([*pieces[0].registered, (first, end)])
            host.give(pieces)
            registered.append((first, end))
            first = end
    nbytes = min(nbytes, 64 - start)
    use = host.use(1000 + start, nbytes)
    at = 1000 + start
    for span in use.spans:
        assert span.address == at
        assert span.nbytes > 0
        at += span.nbytes
        touched = [
            (first, last)
            for first, last in registered
            if first + 1000 < span.address + span.nbytes and span.address < last + 1000
        ]
        inside = [one for one in touched if one[0] + 1000 <= span.address and at <= one[1] + 1000]
        assert (len(touched), len(inside)) == ((1, 1) if span.pinned else (0, 0))
    assert at == 1000 + start + nbytes
    use.end()


def test_a_piece_changes_when_no_copy_uses_it(host: HostMemory) -> None:
    host.populated(0, 0, 2 * PIECE)
    use = host.use(BASE, 10)
    claimed = threading.Event()

    def change() -> None:
        pieces = claim(host, 0, 0, PIECE)
        claimed.set()
        host.give(pieces)

    thread = threading.Thread(target=change)
    thread.start()
    host.use(BASE + PIECE, 10).end()  # another piece: at once
    assert not claimed.wait(0.05)
    use.end()
    assert claimed.wait(PATIENCE_S)
    thread.join()


def test_a_piece_that_is_used_for_too_long_is_left_as_it_is(host: HostMemory) -> None:
    host.populated(0, 0, 2 * PIECE)
    use = host.use(BASE + PIECE, 10)
    assert host.claim(0, 0, 2 * PIECE, 0.01) is None
    host.use(BASE, 2 * PIECE).end()  # and others may use it again
    use.end()
    assert host.claim(0, 0, 2 * PIECE, 0) is not None


def test_a_copy_waits_while_a_piece_of_it_changes_and_finds_what_it_became(
    host: HostMemory,
) -> None:
    host.populated(0, 0, 2 * PIECE)
    pieces = claim(host, 0, PIECE, 2 * PIECE)
    found: list[Span] = []

    def copy() -> None:
        use = host.use(BASE, 2 * PIECE)
        found.extend(use.spans)
        use.end()

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join(0.05)
    assert found == []
    pieces[0].registered = [(PIECE, 2 * PIECE)]
    host.give(pieces)
    thread.join(PATIENCE_S)
    assert found == [
        Span(BASE, PIECE, pinned=False), Span(BASE + PIECE, PIECE, pinned=True),
    ]  # fmt: skip


def test_a_full_piece_is_due_at_once_and_others_when_nothing_was_added_for_a_while(
    host: HostMemory,
) -> None:
    assert not host.waits()
    host.populated(0, 0, PIECE + 0x1000)
    assert host.waits()
    assert host.unsettled(10**12) == [(0, 0)]
    assert host.unsettled(0) == [(0, 0), (0, PIECE)]


def test_memory_that_exists_already_changes_nothing(host: HostMemory) -> None:
    host.populated(0, 0, PIECE)
    host.settled(0, 0)
    assert not host.populated(0, 0x1000, 0x2000)
    assert not host.waits()
    assert host.populated(0, 0, PIECE + 1)
    assert host.waits()


def test_what_was_discarded_does_not_exist(host: HostMemory) -> None:
    host.populated(0, 0, 3 * PIECE)
    host.forget(0, PIECE - 0x1000, 2 * PIECE)
    assert host.existing_bytes == 2 * PIECE - 0x1000
    assert host.unsettled(10**12) == [(0, 2 * PIECE)]
