"""The record: bounded, complete as far as it reaches, and honest about what it forgot."""

from __future__ import annotations

import pytest

from tierd.core.errors import IllegalEvent
from tierd.core.machine import TierMachine
from tierd.core.model import (
    Acquire,
    Action,
    Admit,
    ArenaAdded,
    BudgetChanged,
    ClientGone,
    ClientJoined,
    CoreConfig,
    Discard,
    DiscardDone,
    Event,
    Grant,
    LayerKey,
    ModelAdded,
    ModelRemoved,
    Plan,
    PlanOver,
    Read,
    ReadDone,
    Release,
    WeightChanged,
)

LAYER = 2 << 20


def machine_with(length: int, layers: int = 3) -> TierMachine:
    machine = TierMachine(CoreConfig(2 * LAYER, story_length=length))
    machine.handle(ArenaAdded(1, 0, 64 * LAYER))
    machine.handle(ModelAdded(2, 7, "m", 0, (LAYER,) * layers))
    machine.handle(ClientJoined(3, 5))
    return machine


def settle(machine: TierMachine, event: Event) -> list[Action]:
    """Handles the event, and completes all that follows from it."""
    done: list[Action] = []
    todo = machine.handle(event)
    while todo:
        action = todo.pop(0)
        done.append(action)
        if isinstance(action, Read):
            todo += machine.handle(ReadDone(event.at_ns, action.slot))
        elif isinstance(action, Discard):
            where = (action.arena, action.offset, action.nbytes)
            todo += machine.handle(DiscardDone(event.at_ns, *where))
    return done


def use(machine: TierMachine, at_ns: int, request: int, layer: int) -> None:
    """Acquires, waits for the read where there is one, releases."""
    actions = settle(machine, Acquire(at_ns, 5, request, LayerKey(7, layer)))
    lease = next(action.lease for action in actions if isinstance(action, Grant))
    settle(machine, Release(at_ns, 5, lease))


def test_an_entry_holds_the_event_its_actions_and_the_reasons() -> None:
    machine = machine_with(100)
    event = Acquire(4, 5, 1, LayerKey(7, 0))
    actions = machine.handle(event)
    entry = list(machine.record.entries())[-1]
    assert (entry.number, entry.at_ns, entry.event, list(entry.actions)) == (3, 4, event, actions)
    assert [decision.what for decision in entry.decisions] == ["wait", "read"]


def test_it_never_keeps_more_than_its_length() -> None:
    machine = machine_with(40)
    for turn in range(50):
        use(machine, 10 + turn, turn + 1, turn % 3)
        kept = sum(1 + len(e.actions) + len(e.decisions) for e in machine.record.entries())
        assert kept <= 40
    assert kept > 25


def test_it_says_how_much_it_has_forgotten() -> None:
    machine, whole = machine_with(40), machine_with(10**6)
    for turn in range(50):
        use(machine, 10 + turn, turn + 1, turn % 3)
        use(whole, 10 + turn, turn + 1, turn % 3)
    extent, everything = machine.record.extent, list(whole.record.entries())
    kept = list(machine.record.entries())
    assert (everything[0].number, whole.record.extent.forgotten_decisions) == (0, 0)
    assert extent.end == len(everything)
    assert extent.first == len(everything) - len(kept)
    assert kept == everything[extent.first :]
    assert extent.first_ns == everything[extent.first].at_ns
    assert extent.forgotten_decisions == sum(
        len(entry.decisions) for entry in everything[: extent.first]
    )


def test_entries_are_read_in_pages_by_number() -> None:
    machine = machine_with(60)
    for turn in range(30):
        use(machine, 10 + turn, turn + 1, turn % 3)
    record = machine.record
    assert record.extent.first > 10
    pages = list(record.entries(0, 4))
    while page := list(record.entries(pages[-1].number + 1, 4)):
        assert len(page) <= 4
        pages += page
    assert pages == list(record.entries())
    assert list(record.entries(record.extent.end)) == []


def test_what_a_replay_needs_is_remembered_beyond_the_ring() -> None:
    machine = machine_with(30)
    machine.handle(ClientJoined(4, 6))
    machine.handle(ModelAdded(4, 8, "gone", 0, (LAYER,)))
    settle(machine, Plan(5, 5, 1, 7, (0, 1, 2)))
    settle(machine, Plan(5, 6, 1, 8, (0,)))
    settle(machine, WeightChanged(5, 5, 300))
    assert machine.record.opening() == []
    settle(machine, ModelRemoved(6, 8))
    settle(machine, ClientGone(7, 6))
    for turn in range(30):
        use(machine, 10 + turn, turn + 2, turn % 3)
    opening = machine.record.opening()
    assert [type(event) for event in opening] == [ArenaAdded, ModelAdded, ClientJoined, Plan]
    assert opening[-1] == Plan(5, 5, 1, 7, (0, 1, 2))
    assert [event.weight for event in opening if isinstance(event, ClientJoined)] == [300]


def test_a_plan_that_was_refused_is_not_one_that_a_replay_needs() -> None:
    machine = machine_with(30)
    assert isinstance(settle(machine, Plan(5, 5, 1, 7, (0, 1)))[0], Admit)
    machine.handle(Plan(6, 5, 2, 7, (0, 99)))
    for turn in range(30):
        use(machine, 10 + turn, turn + 3, turn % 3)
    assert [event for event in machine.record.opening() if isinstance(event, Plan)] == [
        Plan(5, 5, 1, 7, (0, 1))
    ]


def test_the_budget_and_the_end_of_a_plan_are_remembered_where_they_were_in_effect() -> None:
    machine = machine_with(30)
    settle(machine, BudgetChanged(5, 1, 5 * LAYER))
    settle(machine, BudgetChanged(6, 2, LAYER // 2))  # refused
    settle(machine, Plan(7, 5, 1, 7, (0, 1)))
    settle(machine, PlanOver(8, 5, 7))
    for turn in range(30):
        use(machine, 10 + turn, turn + 3, turn % 3)
    opening = machine.record.opening()
    assert opening[0] == BudgetChanged(5, 1, 5 * LAYER)
    assert [type(event) for event in opening[1:]] == [ArenaAdded, ModelAdded, ClientJoined]


def test_an_illegal_event_leaves_no_entry_and_no_reason_behind() -> None:
    machine = machine_with(100)
    use(machine, 10, 1, 0)
    before = list(machine.record.entries())
    with pytest.raises(IllegalEvent):
        machine.handle(ReadDone(11, 99))
    assert list(machine.record.entries()) == before
    use(machine, 12, 2, 1)
    assert list(machine.record.entries())[: len(before)] == before


def test_a_decision_is_a_sentence_when_it_is_read() -> None:
    machine = machine_with(100)
    use(machine, 1_500_000_000, 1, 0)
    lines = [str(decision) for decision in machine.story(LayerKey(7, 0))]
    assert lines[0] == "1.500000 wait 7/0: client 5 stalls for it"
    assert machine.story(LayerKey(7, 1)) == []
