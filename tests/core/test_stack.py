"""Three tiers by hand: one event in, the exact actions out. Layers are granules of G bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.core.stack_by_hand import FIRST, G, feed, key, settle, stack_of
from tierd.core.errors import IllegalEvent
from tierd.core.model import (
    Acquire,
    Admit,
    ArenaAdded,
    ClientGone,
    ClientJoined,
    Done,
    Grant,
    LayerKey,
    ModelRemoved,
    Plan,
    PlanOver,
    Read,
    ReadDone,
    ReadFailed,
    Refuse,
    Release,
)
from tierd.core.stack_model import (
    Copy,
    CopyDone,
    CopyFailed,
    Fenced,
    GpuArenaAdded,
    JoinedGpu,
    ModelPlaced,
    StackAction,
    StackEvent,
    TierBudgetChanged,
    Unload,
)

if TYPE_CHECKING:
    from tierd.core.stack import TierStack


def test_a_layer_goes_from_the_disk_through_dram_to_the_gpu_and_is_granted_when_it_is_there() -> (
    None
):
    stack = stack_of(4, 2, (1, 1))
    first = feed(stack, Acquire(0, FIRST, 1, key(1)))
    reads = [action for action in first if isinstance(action, Read)]
    assert key(1) in [read.key for read in reads]
    assert not [action for action in first if isinstance(action, Copy | Grant)]
    [read] = [read for read in reads if read.key == key(1)]
    [copy] = [a for a in feed(stack, ReadDone(1, read.slot)) if isinstance(a, Copy)]
    assert (copy.gpu, copy.key, copy.arena) == (0, key(1), 100)
    assert (copy.from_slot, copy.from_arena, copy.from_offset) == (read.slot, 0, read.offset)
    [grant] = [a for a in feed(stack, CopyDone(2, 0, copy.slot)) if isinstance(a, Grant)]
    assert (grant.client, grant.arena, grant.offset) == (FIRST, 100, copy.offset)
    assert grant.waited_ns == 2
    assert stack.dram.snapshot().memory.leased_bytes == 0


def test_what_is_in_dram_is_copied_without_a_read_and_what_is_on_the_gpu_without_a_copy() -> None:
    stack = stack_of(4, 4, (1, 1))
    feed(stack, ClientJoined(0, 1), Acquire(0, 1, 1, key(0)), ReadDone(0, 0))
    actions = settle(stack, feed(stack, Acquire(0, FIRST, 1, key(0))))
    assert key(0) not in [action.key for action in actions if isinstance(action, Read)]
    assert [action.key for action in actions if isinstance(action, Copy)] == [key(0)]
    again = feed(stack, Acquire(1, FIRST, 2, key(0)))
    assert [type(action) for action in again] == [Grant]


def test_a_plan_on_a_gpu_needs_its_largest_layer_on_both_tiers() -> None:
    plan = Plan(0, FIRST, 7, 0, (0, 1))
    for dram, gpu, code in ((3, 3, None), (2, 3, "budget_too_small"), (3, 2, "budget_too_small")):
        stack = stack_of(dram, gpu, (1, 3))
        actions = feed(stack, plan)
        refusals = [(a.request, a.code) for a in actions if isinstance(a, Refuse)]
        assert refusals == ([] if code is None else [(7, code)])
        assert (Admit(FIRST, 7, 3 * G) in actions) == (code is None)
        assert bool(stack.exchange.feeds) == (code is None)
        assert (stack.dram.snapshot().memory.reserved_bytes == 0) == (code is not None)


def test_a_failed_read_and_a_failed_copy_reach_the_client_on_the_gpu() -> None:
    stack = stack_of(4, 2, (1, 1))
    actions = feed(stack, Acquire(0, FIRST, 1, key(1)))
    [slot] = [a.slot for a in actions if isinstance(a, Read) and a.key == key(1)]
    refused = feed(stack, ReadFailed(1, slot, "read_failed", "EIO"))
    assert Refuse(FIRST, 1, "read_failed", "EIO") in refused
    actions = feed(stack, Acquire(2, FIRST, 2, key(1)))
    [slot] = [a.slot for a in actions if isinstance(a, Read) and a.key == key(1)]
    [copy] = [a for a in feed(stack, ReadDone(3, slot)) if isinstance(a, Copy)]
    refused = feed(stack, CopyFailed(4, 0, copy.slot, "copy_failed", "ECC"))
    assert Refuse(FIRST, 2, "copy_failed", "ECC") in refused
    assert [a.key for a in refused if isinstance(a, Unload)] == [key(1)]
    assert stack.dram.snapshot().memory.leased_bytes == 0


def test_a_layer_that_dram_put_off_is_asked_for_again_when_the_read_before_it_failed() -> None:
    stack = stack_of(2, 4, (2, 2), copies=2)
    actions = feed(stack, Acquire(0, FIRST, 1, key(0)), Acquire(0, FIRST, 2, key(1)))
    assert [a.key for a in actions if isinstance(a, Read)] == [key(0)]
    [only] = stack.exchange.feeds.values()
    assert only.full
    assert [read.key for _, read in only.parked] == [key(1)]
    assert "put off" in [one.what for one in stack.gpus[0].story(key(1))]
    failed = feed(stack, ReadFailed(1, 0, "read_failed", "EIO"))
    assert [a.key for a in failed if isinstance(a, Read)] == [key(1)]
    actions = settle(stack, failed, 2)
    assert [a.key for a in actions if isinstance(a, Grant)] == [key(1)]


def test_the_slots_of_a_dead_client_are_reused_only_after_its_fence() -> None:
    stack = stack_of(4, 1, (1, 1), clients=2)
    settle(stack, feed(stack, Acquire(0, FIRST, 1, key(0))))
    feed(stack, ClientGone(1, FIRST))
    assert not feed(stack, Acquire(2, FIRST + 1, 1, key(1))), "it waits, and nothing is unloaded"
    actions = settle(stack, feed(stack, Fenced(3, FIRST)))
    assert [a.key for a in actions if isinstance(a, Unload)] == [key(0)]
    assert [a.key for a in actions if isinstance(a, Grant)] == [key(1)]


def test_a_client_that_dies_at_any_step_of_a_copy_leaves_nothing() -> None:
    for step in range(4):
        stack = stack_of(4, 2, (1, 1))
        actions = feed(stack, Plan(0, FIRST, 1, 0, (0, 1)), Acquire(0, FIRST, 2, key(0)))
        for _ in range(step):
            for action in actions:
                if isinstance(action, Read):
                    actions = feed(stack, ReadDone(1, action.slot))
                    break
                if isinstance(action, Copy):
                    actions = feed(stack, CopyDone(1, 0, action.slot))
                    break
        slots = stack.dram.books.in_flight
        feed(stack, ClientGone(2, FIRST), Fenced(3, FIRST))
        for _ in range(10):
            for number in list(slots):
                feed(stack, ReadDone(4, number))
            for found in list(stack.exchange.feeds.values()):
                for number in list(found.copying):
                    feed(stack, CopyDone(4, 0, number))
        assert not stack.exchange.feeds
        for machine in (stack.dram, *stack.gpus):
            memory = machine.snapshot().memory
            assert memory.leased_bytes == memory.reserved_bytes == memory.quarantined_bytes == 0
        feed(stack, ModelRemoved(5, 0))
        assert not any(machine.books.slots for machine in (stack.dram, *stack.gpus))


def passes(stack: TierStack, client: int, layers: int, count: int) -> list[StackAction]:
    """A client with a plan computes so many passes; the actions of the last one."""
    settle(stack, feed(stack, Plan(0, client, 1, 0, tuple(range(layers)))))
    actions: list[StackAction] = []
    request = at_ns = 1
    for number in range(count * layers):
        if number == (count - 1) * layers:
            actions = []
        request += 1
        at_ns += 1_000_000
        acquire = Acquire(at_ns, client, request, key(number % layers))
        mine = settle(stack, feed(stack, acquire), at_ns)
        actions += mine
        [lease] = [a.lease for a in mine if isinstance(a, Grant)]
        actions += settle(stack, feed(stack, Release(at_ns, client, lease)), at_ns)
    return actions


def test_what_stays_on_the_gpu_may_leave_dram() -> None:
    """8 layers, 5 on the GPU, 3 in DRAM: on one tier each pass would read 5, together they need
    not read more than the moving layers of both."""
    stack = stack_of(4, 6, (1,) * 8)
    actions = passes(stack, FIRST, 8, 8)
    [only] = stack.exchange.feeds.values()
    assert only.declared is not None
    assert len(only.declared.order) <= 5
    reads = [action.key for action in actions if isinstance(action, Read)]
    assert len(reads) <= 4


def test_a_model_that_fits_the_gpu_is_copied_once_and_needs_no_dram() -> None:
    stack = stack_of(3, 8, (1,) * 8)
    actions = passes(stack, FIRST, 8, 5)
    assert not [action for action in actions if isinstance(action, Copy)]
    [only] = stack.exchange.feeds.values()
    assert only.declared is not None
    assert len(only.declared.order) == 1
    assert len(stack.dram.books.models[0].plans) == 1


def test_two_gpus_share_one_read() -> None:
    stack = stack_of(4, 2, (1, 1), gpus=2)
    actions = feed(stack, Acquire(0, 10, 1, key(1)), Acquire(0, 20, 1, key(1)))
    slots = [a.slot for a in actions if isinstance(a, Read) and a.key == key(1)]
    assert len(slots) == 1
    copies = [a for a in feed(stack, ReadDone(1, slots[0])) if isinstance(a, Copy)]
    assert sorted(copy.gpu for copy in copies) == [0, 1]


def test_the_next_leader_takes_the_plan_over_and_the_last_one_takes_it_away() -> None:
    stack = stack_of(8, 2, (1,) * 6, clients=2)
    settle(stack, feed(stack, Plan(0, FIRST, 1, 0, (0, 1, 2)), Plan(0, FIRST + 1, 1, 0, (3, 4))))
    [only] = stack.exchange.feeds.values()
    assert only.declared is not None
    assert set(only.declared.order) == {0, 1, 2}
    settle(stack, feed(stack, ClientGone(1, FIRST)))
    assert set(only.declared.order) == {3, 4}
    settle(stack, feed(stack, ClientGone(2, FIRST + 1)))
    assert not stack.exchange.feeds
    assert [client for client in stack.dram.books.clients if client < 0] == []


def weights(stack: TierStack) -> list[int]:
    """Of the pseudo-clients, in DRAM."""
    return [client.weight for client in stack.dram.books.clients.values() if client.id < 0]


def test_a_gpu_has_the_share_of_the_disk_that_its_clients_have_together() -> None:
    stack = stack_of(8, 2, (1,) * 6)
    feed(stack, JoinedGpu(0, 50, 0, weight=300))
    settle(stack, feed(stack, Acquire(0, 50, 1, key(0))))
    assert weights(stack) == [], "nobody plans"
    settle(stack, feed(stack, Plan(1, FIRST, 1, 0, (0, 1, 2))))
    assert weights(stack) == [100]
    settle(stack, feed(stack, Plan(2, 50, 2, 0, (3, 4))))
    assert weights(stack) == [400]
    settle(stack, feed(stack, Plan(3, 50, 3, 0, (4, 5))))
    assert weights(stack) == [400]
    settle(stack, feed(stack, PlanOver(4, FIRST, 0)))
    assert weights(stack) == [300]
    settle(stack, feed(stack, ClientGone(5, 50)))
    assert weights(stack) == []


ILLEGAL: list[tuple[StackEvent, str]] = [
    (CopyDone(0, 0, 0), "is not being copied to"),
    (CopyDone(0, 9, 0), "is not being copied to"),
    (JoinedGpu(0, 50, 1), "there is no GPU 1; this node has 1"),
    (JoinedGpu(0, FIRST, 0), "client 10 is connected"),
    (ClientJoined(0, FIRST), "client 10 is connected"),
    (ClientJoined(0, -1), "belong to the stack"),
    (Acquire(0, -1, 1, LayerKey(0, 0)), "belong to the stack"),
    (Fenced(0, FIRST), "not on its way out"),
    (GpuArenaAdded(0, 0, 0, G), "arena 0 exists"),
    (ArenaAdded(0, 100, G), "arena 100 exists"),
    (ModelPlaced(0, 0, 5, 100), "model 5 is not served"),
    (ModelRemoved(0, 5), "model 5 is not served"),
]


@pytest.mark.parametrize(("event", "text"), ILLEGAL, ids=lambda value: type(value).__name__)
def test_an_illegal_event_raises_and_changes_nothing(event: StackEvent, text: str) -> None:
    stack = stack_of(4, 2, (1, 1))
    before = [machine.snapshot() for machine in (stack.dram, *stack.gpus)]
    with pytest.raises(IllegalEvent, match=text):
        stack.handle(event)
    stack.check()
    assert [machine.snapshot() for machine in (stack.dram, *stack.gpus)] == before


def test_what_is_due_when_somebody_joins_a_gpu_is_done_then() -> None:
    """Any event may be the one that finds out that time has passed."""
    stack = stack_of(8, 3, (1, 1, 1), clients=2)
    for layer in range(3):
        settle(stack, feed(stack, Acquire(0, FIRST, layer, key(layer))))
    assert not feed(stack, Plan(0, FIRST + 1, 7, 0, (0, 1)))  # it waits for what the other holds
    patience_ns = stack.gpus[0].config.admission_patience_ns
    actions = feed(stack, JoinedGpu(patience_ns + 1, FIRST + 2, 0))
    assert [action.request for action in actions if isinstance(action, Refuse)] == [7]


def test_a_tiers_budget_changes_alone_and_its_layers_leave_it() -> None:
    stack = stack_of(4, 4, (1, 1, 1, 1))
    settle(stack, feed(stack, Plan(0, FIRST, 1, 0, (0, 1, 2, 3))))
    actions = feed(stack, TierBudgetChanged(1, 7, 0, 2 * G))
    assert Done(7, ()) in actions
    assert len([action for action in actions if isinstance(action, Unload)]) == 2
    assert (stack.gpus[0].budget_bytes, stack.dram.budget_bytes) == (2 * G, 4 * G)
    assert Done(8, ()) in feed(stack, TierBudgetChanged(1, 8, None, 5 * G))
    assert (stack.gpus[0].budget_bytes, stack.dram.budget_bytes) == (2 * G, 5 * G)


def test_the_budget_of_a_gpu_that_is_not_there_is_illegal_and_changes_nothing() -> None:
    stack = stack_of(4, 4, (1, 1))
    with pytest.raises(IllegalEvent, match="no GPU 1"):
        stack.handle(TierBudgetChanged(1, 7, 1, 2 * G))
    stack.check()


def test_the_end_of_the_last_plan_closes_the_feed_and_its_reserve_in_dram_ends() -> None:
    stack = stack_of(4, 4, (1, 1), clients=2)
    for client in (FIRST, FIRST + 1):
        settle(stack, feed(stack, Plan(0, client, 1, 0, (0, 1))))
    feed(stack, PlanOver(1, FIRST, 0))
    assert stack.dram.snapshot().memory.reserved_bytes == G
    assert stack.gpus[0].snapshot().memory.reserved_bytes == G
    feed(stack, PlanOver(2, FIRST + 1, 0))
    assert stack.dram.snapshot().memory.reserved_bytes == 0
    assert not stack.exchange.feeds
    again = settle(stack, feed(stack, Plan(3, FIRST, 2, 0, (0, 1))))
    assert [action for action in again if isinstance(action, Admit)]


def test_a_plan_that_waits_for_its_feed_is_refused_when_it_is_taken_back() -> None:
    stack = stack_of(3, 8, (1,) * 3, (2,))
    feed(stack, ClientJoined(0, 1), Plan(0, 1, 1, 0, (0, 1, 2)))
    settle(stack, feed(stack, *(Acquire(0, 1, 2 + i, key(i), ahead=i > 0) for i in range(3))))
    assert not feed(stack, Plan(1, FIRST, 1, 1, (0,)))
    assert stack.pressed(None)
    assert not stack.pressed(0)
    [refusal] = feed(stack, PlanOver(2, FIRST, 1))
    assert isinstance(refusal, Refuse)
    assert (refusal.client, refusal.code) == (FIRST, "bad_request")
    assert not stack.exchange.feeds


def test_a_model_whose_leases_are_kept_on_the_gpu_leaves_dram_without_being_asked_for_again() -> (
    None
):
    stack = stack_of(5, 5, (1,) * 4)
    actions = settle(stack, feed(stack, Plan(0, FIRST, 1, 0, (0, 1, 2, 3))))
    asked = (Acquire(0, FIRST, 2 + i, key(i), ahead=i > 0) for i in range(4))
    actions += settle(stack, feed(stack, *asked))
    assert len([action for action in actions if isinstance(action, Copy)]) == 4
    assert not stack.pressed(0)
    [only] = stack.exchange.feeds.values()
    assert only.declared is not None
    assert len(only.declared.order) == 1
    assert not stack.pressed(None)


def test_what_the_gpu_has_to_give_up_is_wanted_in_dram_again() -> None:
    stack = stack_of(9, 5, (1,) * 4)
    actions = settle(stack, feed(stack, Plan(0, FIRST, 1, 0, (0, 1, 2, 3))))
    asked = (Acquire(0, FIRST, 2 + i, key(i), ahead=i > 0) for i in range(4))
    actions = settle(stack, feed(stack, *asked))
    leases = [action.lease for action in actions if isinstance(action, Grant)]
    settle(stack, feed(stack, TierBudgetChanged(1, 1, 0, 2 * G)))
    assert stack.pressed(0)
    settle(stack, feed(stack, *(Release(2, FIRST, lease) for lease in leases)))
    passes(stack, FIRST, 4, 3)
    [only] = stack.exchange.feeds.values()
    assert only.declared is not None
    assert len(only.declared.order) > 1
