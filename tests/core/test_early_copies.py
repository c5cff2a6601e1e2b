"""A layer is copied to a GPU while it is read into DRAM: what the stack asks for, and when not."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.core import stack_by_hand
from tests.core.stack_by_hand import FIRST, feed, finish, key, of, settle
from tierd.core.errors import IllegalEvent
from tierd.core.model import (
    Acquire,
    ClientGone,
    ClientJoined,
    Discard,
    DiscardDone,
    Evict,
    Grant,
    ModelRemoved,
    Plan,
    Read,
    ReadDone,
    ReadFailed,
    Refuse,
)
from tierd.core.stack_model import Copy, CopyDone, CopyFailed, Fenced, StopCopy, Unload

if TYPE_CHECKING:
    from tierd.core.model import LayerKey
    from tierd.core.stack import TierStack

stack_of = partial(stack_by_hand.stack_of, early=True)


def asked(stack: TierStack, layer: LayerKey, request: int = 1) -> tuple[Read, Copy]:
    """The read and the early copy of a layer that the client of GPU 0 asks for."""
    actions = feed(stack, Acquire(0, FIRST, request, layer))
    [read] = [read for read in of(Read, actions) if read.key == layer]
    [copy] = [copy for copy in of(Copy, actions) if copy.key == layer]
    assert actions.index(read) < actions.index(copy)
    return read, copy


def nothing_is_left(stack: TierStack) -> bool:
    """No feed, no lease, nothing under way."""
    memory = [machine.snapshot().memory for machine in (stack.dram, *stack.gpus)]
    return not (
        stack.exchange.feeds
        or memory[0].reserved_bytes
        or any(tier.leased_bytes or tier.in_flight_bytes for tier in memory)
    )


def test_a_copy_starts_with_the_read_of_its_layer_and_becomes_that_of_the_lease() -> None:
    stack = stack_of(4, 2, (1, 1))
    read, copy = asked(stack, key(1))
    assert copy.filling
    assert (copy.from_slot, copy.from_arena, copy.from_offset) == (read.slot, 0, read.offset)
    assert not of(Copy, feed(stack, ReadDone(1, read.slot)))
    assert stack.dram.snapshot().memory.leased_bytes == read.nbytes
    [grant] = of(Grant, feed(stack, CopyDone(2, 0, copy.slot)))
    assert (grant.client, grant.slot, grant.waited_ns) == (FIRST, copy.slot, 2)
    assert stack.dram.snapshot().memory.leased_bytes == 0


def test_what_is_being_read_for_another_client_is_copied_from_when_it_is_asked_for() -> None:
    stack = stack_of(4, 2, (1, 1))
    [read] = of(Read, feed(stack, ClientJoined(0, 1), Acquire(0, 1, 1, key(0))))
    actions = feed(stack, Acquire(1, FIRST, 1, key(0)))
    assert not [one for one in of(Read, actions) if one.key == key(0)]
    [copy] = of(Copy, actions)
    assert (copy.filling, copy.from_slot) == (True, read.slot)
    granted = feed(stack, ReadDone(2, read.slot))
    assert [grant.client for grant in of(Grant, granted)] == [1]
    assert [grant.client for grant in of(Grant, feed(stack, CopyDone(3, 0, copy.slot)))] == [FIRST]


def test_the_record_of_a_gpu_says_how_a_layer_came_and_why_it_did_not() -> None:
    stack = stack_of(4, 2, (1, 1))
    _, copy = asked(stack, key(1))
    feed(stack, ModelRemoved(5, 0))
    feed(stack, CopyFailed(6, 0, copy.slot, "model_removed", "stopped"))
    story = [(one.what, one.text) for one in stack.gpus[0].story(key(1))]
    assert ("copy", f"from slot {copy.from_slot} of DRAM, while that is read") in story
    assert ("stop", "its copy: model 'm0' was removed") in story
    times = [entry.at_ns for entry in stack.gpus[0].record.entries()]
    assert times == sorted(times)


def test_two_gpus_copy_what_one_read_brings() -> None:
    stack = stack_of(4, 2, (1, 1), gpus=2)
    actions = feed(stack, Acquire(0, 10, 1, key(1)), Acquire(0, 20, 1, key(1)))
    [read] = [read for read in of(Read, actions) if read.key == key(1)]
    copies = [copy for copy in of(Copy, actions) if copy.key == key(1)]
    assert [(copy.gpu, copy.filling, copy.from_slot) for copy in copies] == [
        (0, True, read.slot),
        (1, True, read.slot),
    ]
    assert not of(Copy, feed(stack, ReadDone(1, read.slot)))


def test_a_layer_whose_read_waits_for_memory_is_copied_when_that_begins() -> None:
    """A granule that is cold must be discarded elsewhere first: no read, so no early copy."""
    stack = stack_of(3, 3, (1, 1, 1), (2,))
    settle(stack, feed(stack, ClientJoined(0, 1), *(Acquire(0, 1, i, key(i)) for i in range(3))))
    actions = feed(stack, ClientGone(1, 1), Acquire(2, FIRST, 1, key(0, 1)))
    discards = of(Discard, actions)
    if not of(Read, actions):
        assert discards
        assert not of(Copy, actions)
    for discard in discards:
        actions += feed(stack, DiscardDone(3, discard.arena, discard.offset, discard.nbytes))
    assert [copy.filling for copy in of(Copy, actions)] == [True]


def test_what_is_in_dram_is_copied_as_a_whole() -> None:
    stack = stack_of(4, 4, (1, 1))
    feed(stack, ClientJoined(0, 1), Acquire(0, 1, 1, key(0)), ReadDone(0, 0))
    [copy] = [copy for copy in of(Copy, feed(stack, Acquire(0, FIRST, 1, key(0))))]
    assert not copy.filling


def test_without_early_copies_a_copy_starts_when_its_layer_is_whole() -> None:
    stack = stack_by_hand.stack_of(4, 2, (1, 1))
    actions = feed(stack, Acquire(0, FIRST, 1, key(1)))
    assert not of(Copy, actions)
    [read] = [read for read in of(Read, actions) if read.key == key(1)]
    assert [copy.filling for copy in of(Copy, feed(stack, ReadDone(1, read.slot)))] == [False]


def test_a_read_that_fails_fails_the_client_when_its_copy_has_ended() -> None:
    """Until then the slot of the GPU is nobody else's: something may still write to it."""
    stack = stack_of(4, 2, (1, 1), copies=2)
    read, copy = asked(stack, key(1))
    failed = feed(stack, ReadFailed(1, read.slot, "read_failed", "EIO"))
    assert not of(StopCopy, failed), "the shell ends it by itself"
    assert not of(Refuse, failed)
    assert not of(Unload, failed)
    [other] = of(Copy, feed(stack, Acquire(2, FIRST, 2, key(0), ahead=True)))
    assert other.slot != copy.slot
    assert other.offset != copy.offset
    ended = feed(stack, CopyFailed(3, 0, copy.slot, "read_failed", "EIO"))
    assert Refuse(FIRST, 1, "read_failed", "EIO") in ended
    assert [one.key for one in of(Unload, ended)] == [key(1)]
    assert [grant.key for grant in of(Grant, finish(stack))] == [key(0)]


def test_the_memory_of_a_failed_read_may_be_filled_anew_while_its_copy_is_stopped() -> None:
    stack = stack_of(1, 4, (1, 1), copies=2)
    read, copy = asked(stack, key(0))
    feed(stack, ReadFailed(1, read.slot, "read_failed", "EIO"))
    [other] = of(Read, feed(stack, Acquire(2, FIRST, 2, key(1), ahead=True)))
    assert (other.slot, other.arena, other.offset) == (read.slot, read.arena, read.offset)
    ended = feed(stack, CopyFailed(3, 0, copy.slot, "read_failed", "EIO"))
    assert Refuse(FIRST, 1, "read_failed", "EIO") in ended
    assert [grant.key for grant in of(Grant, finish(stack))] == [key(1)]


def test_a_copy_that_fails_while_its_layer_is_read_fails_the_client_and_the_read_goes_on() -> None:
    stack = stack_of(4, 2, (1, 1))
    read, copy = asked(stack, key(1))
    failed = feed(stack, CopyFailed(1, 0, copy.slot, "copy_failed", "ECC"))
    assert Refuse(FIRST, 1, "copy_failed", "ECC") in failed
    assert [one.key for one in of(Unload, failed)] == [key(1)]
    [only] = stack.exchange.feeds.values()
    assert only.orphans
    again = feed(stack, Acquire(2, FIRST, 2, key(1)))
    [second] = of(Copy, again)
    assert second.filling
    feed(stack, ReadDone(3, read.slot))
    assert not only.orphans
    assert stack.dram.snapshot().memory.leased_bytes == read.nbytes, "of the second copy"
    assert [one.request for one in of(Grant, feed(stack, CopyDone(4, 0, second.slot)))] == [2]
    assert stack.dram.snapshot().memory.leased_bytes == 0


def test_an_orphaned_request_whose_read_fails_as_well_leaves_nothing() -> None:
    stack = stack_of(4, 2, (1, 1))
    read, copy = asked(stack, key(1))
    feed(stack, CopyFailed(1, 0, copy.slot, "copy_failed", "ECC"))
    feed(stack, ReadFailed(2, read.slot, "read_failed", "EIO"))
    finish(stack)
    assert nothing_is_left(stack)


@pytest.mark.parametrize("answer", ["failed", "done"])
@pytest.mark.parametrize("read_first", [False, True])
def test_a_removed_model_stops_its_copies_and_the_gpu_has_the_slot_back_with_the_answer(
    answer: str, read_first: bool
) -> None:
    stack = stack_of(4, 2, (1, 1))
    read, copy = asked(stack, key(1))
    removed = feed(stack, ModelRemoved(1, 0))
    assert [one.code for one in of(Refuse, removed)] == ["model_removed"]
    assert of(StopCopy, removed) == [StopCopy(0, copy.slot)]
    assert not of(Unload, removed)
    if read_first or answer == "done":
        gone = feed(stack, ReadDone(2, read.slot))
        assert [one.slot for one in of(Evict, gone)] == [read.slot]
    if answer == "done":
        ended = feed(stack, CopyDone(3, 0, copy.slot))
    else:
        ended = feed(stack, CopyFailed(3, 0, copy.slot, "model_removed", "stopped"))
    assert of(Unload, ended) == [Unload(0, copy.slot, copy.generation, key(1))]
    if not (read_first or answer == "done"):
        feed(stack, ReadDone(4, read.slot))
    finish(stack)
    assert nothing_is_left(stack)
    assert not any(machine.books.slots for machine in (stack.dram, *stack.gpus))


def test_a_copy_is_whole_only_after_its_source_is() -> None:
    stack = stack_of(4, 2, (1, 1))
    read, copy = asked(stack, key(1))
    with pytest.raises(IllegalEvent, match="its source is still being read"):
        stack.handle(CopyDone(1, 0, copy.slot))
    stack.check()
    feed(stack, ReadFailed(2, read.slot, "read_failed", "EIO"))
    with pytest.raises(IllegalEvent, match="the read of its source failed"):
        stack.handle(CopyDone(3, 0, copy.slot))
    feed(stack, CopyFailed(4, 0, copy.slot, "read_failed", "EIO"))


def test_a_stopped_copy_is_whole_only_after_its_source_is() -> None:
    stack = stack_of(4, 2, (1, 1))
    read, copy = asked(stack, key(1))
    feed(stack, ModelRemoved(1, 0))
    with pytest.raises(IllegalEvent, match="its source is still being read"):
        stack.handle(CopyDone(2, 0, copy.slot))
    feed(stack, ReadFailed(3, read.slot, "read_failed", "EIO"))
    with pytest.raises(IllegalEvent, match="the read of its source failed"):
        stack.handle(CopyDone(4, 0, copy.slot))
    feed(stack, CopyFailed(5, 0, copy.slot, "read_failed", "EIO"))


def test_a_failed_read_that_is_illegal_breaks_no_copy() -> None:
    stack = stack_of(4, 2, (1, 1))
    read, copy = asked(stack, key(1))
    feed(stack, ReadDone(1, read.slot))
    with pytest.raises(IllegalEvent, match="is not being read"):
        stack.handle(ReadFailed(2, read.slot, "read_failed", "EIO"))
    assert of(Grant, feed(stack, CopyDone(3, 0, copy.slot)))


def test_a_client_that_dies_at_any_step_of_an_early_copy_leaves_nothing() -> None:
    for step in range(3):
        stack = stack_of(4, 2, (1, 1))
        actions = feed(stack, Plan(0, FIRST, 1, 0, (0, 1)), Acquire(0, FIRST, 2, key(0)))
        [copy] = [copy for copy in of(Copy, actions) if copy.key == key(0)]
        assert copy.filling
        if step > 0:
            feed(stack, ReadDone(1, copy.from_slot))
        if step > 1:
            feed(stack, CopyDone(1, 0, copy.slot))
        feed(stack, ClientGone(2, FIRST), Fenced(3, FIRST))
        finish(stack)
        assert nothing_is_left(stack)
