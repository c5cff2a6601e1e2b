"""A GPU that reads past DRAM: what DRAM has is copied, all else is read directly."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.core import stack_by_hand
from tests.core.stack_by_hand import FIRST, G, feed, finish, key, of, settle
from tierd.core.model import (
    Acquire,
    Admit,
    ArenaAdded,
    ClientGone,
    ClientJoined,
    CoreConfig,
    Grant,
    Hint,
    ModelAdded,
    ModelRemoved,
    Pin,
    Plan,
    PlanOver,
    Read,
    ReadDone,
    ReadFailed,
    Refuse,
    Release,
)
from tierd.core.stack import TierStack
from tierd.core.stack_model import (
    Copy,
    CopyDone,
    CopyFailed,
    DirectRead,
    Fenced,
    GpuArenaAdded,
    JoinedGpu,
    ModelPlaced,
    StackConfig,
    Unload,
)

if TYPE_CHECKING:
    from tierd.core.stack_model import StackAction

stack_of = partial(stack_by_hand.stack_of, direct=True, early=True)


def has_nothing_in_dram(stack: TierStack) -> bool:
    memory = stack.dram.snapshot().memory
    pseudo = [client for client in stack.dram.books.clients if client < 0]
    return not (memory.leased_bytes or memory.reserved_bytes or pseudo)


def test_a_layer_that_dram_has_not_is_read_past_it() -> None:
    stack = stack_of(4, 2, (1, 1))
    actions = feed(stack, Acquire(0, FIRST, 1, key(1)))
    [read] = of(DirectRead, actions)
    assert (read.gpu, read.key, read.arena, read.nbytes) == (0, key(1), 100, G)
    assert not of(Read, actions)
    assert not of(Copy, actions)
    assert has_nothing_in_dram(stack)
    told = {one.what: one.text for one in stack.gpus[0].story(key(1))}
    assert told["direct read"] == "past DRAM, which has it not"
    [grant] = of(Grant, feed(stack, CopyDone(2, 0, read.slot)))
    assert (grant.client, grant.offset, grant.waited_ns) == (FIRST, read.offset, 2)
    assert not stack.dram.books.slots


def test_a_direct_read_that_fails_is_never_tried_another_way() -> None:
    stack = stack_of(4, 2, (1, 1))
    [read] = of(DirectRead, feed(stack, Acquire(0, FIRST, 1, key(1))))
    failed = feed(stack, CopyFailed(1, 0, read.slot, "read_failed", "not direct"))
    assert Refuse(FIRST, 1, "read_failed", "not direct") in failed
    assert [one.key for one in of(Unload, failed)] == [key(1)]
    assert not of(Read, failed)
    assert not stack.exchange.feeds


def test_what_dram_has_is_copied_from_there() -> None:
    stack = stack_of(4, 4, (1, 1))
    feed(stack, ClientJoined(0, 1), Acquire(0, 1, 1, key(0)), ReadDone(0, 0))
    actions = feed(stack, Acquire(1, FIRST, 1, key(0)))
    [copy] = of(Copy, actions)
    assert not copy.filling
    assert not of(DirectRead, actions)
    assert [one.client for one in of(Grant, feed(stack, CopyDone(2, 0, copy.slot)))] == [FIRST]
    assert [client for client in stack.dram.books.clients if client < 0] == []


def test_what_dram_is_reading_is_copied_while_it_is_read() -> None:
    stack = stack_of(4, 4, (1, 1))
    [read] = of(Read, feed(stack, ClientJoined(0, 1), Acquire(0, 1, 1, key(0))))
    [copy] = of(Copy, feed(stack, Acquire(1, FIRST, 1, key(0))))
    assert copy.filling
    feed(stack, ReadDone(2, read.slot))
    assert [one.client for one in of(Grant, feed(stack, CopyDone(3, 0, copy.slot)))] == [FIRST]


def test_a_plan_of_a_direct_gpu_needs_nothing_in_dram_and_brings_nothing_there() -> None:
    stack = stack_of(1, 3, (1, 3, 1))
    actions = settle(stack, feed(stack, Plan(0, FIRST, 7, 0, (0, 1, 2))))
    assert Admit(FIRST, 7, 3 * G) in actions
    assert of(DirectRead, actions), "the GPU's own lookahead"
    assert not of(Read, actions)
    assert has_nothing_in_dram(stack)
    feed(stack, PlanOver(1, FIRST, 0))
    assert not stack.exchange.feeds


def test_hints_of_a_direct_gpu_are_not_heard_in_dram() -> None:
    stack = stack_of(4, 2, (1,) * 4)
    settle(stack, feed(stack, Plan(0, FIRST, 1, 0, (0, 1, 2, 3), kind="open")))
    actions = feed(stack, Hint(1, FIRST, 0, (2,), (900_000,)))
    assert not of(Read, settle(stack, actions))
    assert has_nothing_in_dram(stack)


def test_a_client_of_dram_that_has_all_of_it_keeps_no_direct_gpu_waiting() -> None:
    """A layer that is there, but that DRAM cannot promise to keep for the copy, is read past it."""
    stack = stack_of(2, 4, (2, 2))
    feed(stack, ClientJoined(0, 1), Acquire(0, 1, 1, key(0)), ReadDone(0, 0))
    actions = feed(stack, Acquire(1, FIRST, 1, key(0)))
    [read] = of(DirectRead, actions)
    assert not of(Copy, actions)
    told = {one.what: one.text for one in stack.gpus[0].story(key(0))}
    assert told["direct read"] == "past DRAM, which has it, but no room to keep it meanwhile"
    assert [one.client for one in of(Grant, feed(stack, CopyDone(2, 0, read.slot)))] == [FIRST]


def test_a_copy_ahead_beside_a_direct_read_has_a_place_in_dram_only_while_it_runs() -> None:
    stack = stack_of(4, 4, (1, 1, 1), copies=2)
    settle(stack, feed(stack, ClientJoined(0, 1), Acquire(0, 1, 1, key(0))))
    actions = feed(stack, Acquire(1, FIRST, 1, key(1)), Acquire(1, FIRST, 2, key(0), ahead=True))
    [read], [copy] = of(DirectRead, actions), of(Copy, actions)
    [only] = stack.exchange.feeds.values()
    assert only.joined
    feed(stack, CopyDone(2, 0, copy.slot))
    assert not only.joined
    assert of(Grant, feed(stack, CopyDone(3, 0, read.slot)))


def test_a_pinned_layer_is_read_into_dram_and_copied_from_there() -> None:
    stack = stack_of(4, 4, (1, 1))
    settle(stack, feed(stack, Pin(0, 1, (key(1),))))
    assert [one.key for one in of(Copy, feed(stack, Acquire(1, FIRST, 1, key(1))))] == [key(1)]


def test_a_read_into_dram_that_fails_fails_the_copy_on_a_direct_gpu_too() -> None:
    stack = stack_of(4, 4, (1, 1))
    [read] = of(Read, feed(stack, ClientJoined(0, 1), Acquire(0, 1, 1, key(0))))
    [copy] = of(Copy, feed(stack, Acquire(1, FIRST, 1, key(0))))
    feed(stack, ReadFailed(2, read.slot, "read_failed", "EIO"))
    ended = feed(stack, CopyFailed(3, 0, copy.slot, "read_failed", "EIO"))
    assert Refuse(FIRST, 1, "read_failed", "EIO") in ended


def test_a_direct_read_of_a_removed_model_ends_and_leaves_nothing() -> None:
    stack = stack_of(4, 2, (1, 1))
    [read] = of(DirectRead, feed(stack, Acquire(0, FIRST, 1, key(1))))
    removed = feed(stack, ModelRemoved(1, 0))
    assert [one.code for one in of(Refuse, removed)] == ["model_removed"]
    assert not of(Unload, removed)
    ended = feed(stack, CopyDone(2, 0, read.slot))
    assert [one.key for one in of(Unload, ended)] == [key(1)]
    assert not stack.exchange.feeds
    assert not any(machine.books.slots for machine in (stack.dram, *stack.gpus))


def test_a_client_that_dies_during_a_direct_read_leaves_nothing() -> None:
    stack = stack_of(4, 2, (1, 1))
    feed(stack, Plan(0, FIRST, 1, 0, (0, 1)))
    feed(stack, Acquire(0, FIRST, 2, key(0)), ClientGone(1, FIRST), Fenced(2, FIRST))
    finish(stack)
    assert not stack.exchange.feeds
    assert not stack.gpus[0].snapshot().memory.in_flight_bytes


def test_one_gpu_may_read_directly_beside_one_that_does_not() -> None:
    limits = CoreConfig(4 * G)
    stack = TierStack(StackConfig(limits, (limits, limits), early=True, direct=(False, True)))
    feed(stack, ArenaAdded(0, 0, 64 * G, 4 * G), ModelAdded(0, 0, "m", 0, (G, G)))
    for gpu in range(2):
        arena = 1 + gpu
        feed(stack, GpuArenaAdded(0, gpu, arena, 64 * G, 4 * G), ModelPlaced(0, gpu, 0, arena))
        feed(stack, JoinedGpu(0, 10 * (gpu + 1), gpu))
    direct = feed(stack, Acquire(0, 20, 1, key(0)))
    assert [type(one) for one in direct] == [DirectRead]
    through: list[StackAction] = feed(stack, Acquire(0, 10, 1, key(0)))
    assert [one.gpu for one in of(Copy, through)] == [0]
    [read] = [one for one in of(Read, through) if one.key == key(0)]
    settle(stack, [*direct, *through])
    leases = [one.lease for one in of(Grant, feed(stack, Acquire(1, 20, 2, key(0))))]
    assert leases
    feed(stack, Release(2, 20, leases[0]))
    assert read.arena == 0


def test_direct_must_be_said_of_every_gpu() -> None:
    limits = CoreConfig(4 * G)
    with pytest.raises(ValueError, match="`direct` names 1 of 2 GPUs"):
        TierStack(StackConfig(limits, (limits, limits), direct=(True,)))
