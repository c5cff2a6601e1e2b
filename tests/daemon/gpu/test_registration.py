from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierd.gpu.registration import BLOCK_BYTES, HostMemory, Span

BLOCK = 0x10000
BASE = 0x7F0000000000
PATIENCE_S = 20.0


@pytest.fixture
def host() -> HostMemory:
    host = HostMemory(BLOCK)
    host.add_arena(0, BASE, 16 * BLOCK)
    return host


def test_blocks_are_far_below_what_one_call_of_the_driver_can_register() -> None:
    assert BLOCK_BYTES == 32 << 20


def test_memory_that_is_not_registered_is_copied_in_one_call(host: HostMemory) -> None:
    host.populated(0, 0, 4 * BLOCK)
    use = host.use(BASE + 100, 3 * BLOCK)
    assert use.spans == [Span(BASE + 100, 3 * BLOCK, pinned=False)]
    assert use.unpinned_bytes == 3 * BLOCK
    use.end()


def test_memory_of_no_arena_is_copied_too(host: HostMemory) -> None:
    for address in (5, BASE - 1, BASE + 16 * BLOCK):
        use = host.use(address, 10)
        assert use.spans == [Span(address, 10, pinned=False)]
        use.end()


def test_a_copy_is_cut_where_registrations_end(host: HostMemory) -> None:
    host.populated(0, 0, 3 * BLOCK)
    host.registered(0, 0, BLOCK)
    host.registered(0, BLOCK, BLOCK + 0x3000)
    host.registered(0, BLOCK + 0x8000, 2 * BLOCK)
    use = host.use(BASE + BLOCK - 0x1000, BLOCK + 0x2000)
    assert use.spans == [
        Span(BASE + BLOCK - 0x1000, 0x1000, pinned=True),
        Span(BASE + BLOCK, 0x3000, pinned=True),
        Span(BASE + BLOCK + 0x3000, 0x5000, pinned=False),
        Span(BASE + BLOCK + 0x8000, 0x8000, pinned=True),
        Span(BASE + 2 * BLOCK, 0x1000, pinned=False),
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
        while first < last:  # no registration lies in two blocks
            end = min(last, (first // 16 + 1) * 16)
            host.registered(0, first, end)
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


def test_a_range_is_claimed_when_no_copy_uses_it(host: HostMemory) -> None:
    use = host.use(BASE, 10)
    claimed = threading.Event()

    def change() -> None:
        assert host.claim(0, 5, 20, PATIENCE_S)
        claimed.set()
        host.give()

    thread = threading.Thread(target=change)
    thread.start()
    assert not claimed.wait(0.05)
    host.use(BASE + 20, 10).end()  # another range: at once
    use.end()
    assert claimed.wait(PATIENCE_S)
    thread.join()
    assert host.uses == 0


def test_a_range_that_is_used_for_too_long_is_left_as_it_is(host: HostMemory) -> None:
    use = host.use(BASE + BLOCK, 10)
    assert not host.claim(0, 0, 2 * BLOCK, 0.01)
    host.use(BASE, 2 * BLOCK).end()  # and others may use it again
    assert host.claim(0, 0, BLOCK, 0)
    host.give()
    use.end()
    assert host.claim(0, 0, 2 * BLOCK, 0)


def test_a_copy_waits_while_a_part_of_it_changes_and_finds_what_it_became(
    host: HostMemory,
) -> None:
    host.populated(0, 0, 2 * BLOCK)
    assert host.claim(0, BLOCK, 2 * BLOCK, 0)
    found: list[Span] = []

    def copy() -> None:
        use = host.use(BASE, 2 * BLOCK)
        found.extend(use.spans)
        use.end()

    thread = threading.Thread(target=copy)
    thread.start()
    thread.join(0.05)
    assert found == []
    host.registered(0, BLOCK, 2 * BLOCK)
    host.give()
    thread.join(PATIENCE_S)
    assert found == [
        Span(BASE, BLOCK, pinned=False), Span(BASE + BLOCK, BLOCK, pinned=True),
    ]  # fmt: skip


def test_what_is_missing_is_what_exists_and_is_not_registered(host: HostMemory) -> None:
    host.populated(0, 0, BLOCK)
    host.registered(0, 4096, 8192)
    assert host.missing(0, 0) == [(0, 4096), (8192, BLOCK)]
    assert host.registrations(0, 8191, 3 * BLOCK) == [(4096, 8192)]
    assert host.registrations(0, 8192, 3 * BLOCK) == []
    host.unregistered(0, 4096, 8192)
    assert host.missing(0, 0) == [(0, BLOCK)]


def test_a_block_of_which_memory_was_discarded_is_due_at_once(host: HostMemory) -> None:
    """What is read there is copied at once, and what is left of it too."""
    host.populated(0, 0, BLOCK)
    host.settled(0, 0)
    host.forget(0, 4096, 8192)
    assert host.unsettled(10**12) == [(0, 0)]
    host.settled(0, 0)
    host.populated(0, 4096, 8192)
    assert host.unsettled(10**12) == [(0, 0)]


def test_a_full_block_is_due_at_once_and_others_when_nothing_was_added_for_a_while(
    host: HostMemory,
) -> None:
    assert not host.waits()
    host.populated(0, 0, BLOCK + 0x1000)
    assert host.waits()
    assert host.unsettled(10**12) == [(0, 0)]
    assert host.unsettled(0) == [(0, 0), (0, BLOCK)]


def test_memory_that_exists_already_changes_nothing(host: HostMemory) -> None:
    host.populated(0, 0, BLOCK)
    host.settled(0, 0)
    assert not host.populated(0, 0x1000, 0x2000)
    assert not host.waits()
    assert host.populated(0, 0, BLOCK + 1)
    assert host.waits()


def test_what_was_discarded_does_not_exist(host: HostMemory) -> None:
    host.populated(0, 0, 3 * BLOCK)
    host.forget(0, BLOCK - 0x1000, 2 * BLOCK)
    assert host.existing_bytes == 2 * BLOCK - 0x1000
    assert host.missing(0, BLOCK) == []
