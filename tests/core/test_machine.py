"""One event in, the exact actions out. Layers are one granule (G) unless a test says otherwise."""

from __future__ import annotations

import copy
from functools import partial

import pytest

from tests.core import by_hand
from tests.core.by_hand import G, key, tell
from tierd.core.errors import IllegalEvent
from tierd.core.machine import TierMachine
from tierd.core.model import (
    Acquire,
    Admit,
    Adopted,
    ArenaAdded,
    ClientGone,
    ClientJoined,
    CoreConfig,
    Discard,
    DiscardDone,
    Event,
    Evict,
    Grant,
    Later,
    ModelAdded,
    ModelRemoved,
    Plan,
    Read,
    ReadDone,
    ReadFailed,
    Refuse,
    Release,
    Tick,
)

machine_of = partial(by_hand.machine_of, reads_in_flight=1, clients=2)


def test_a_missing_layer_is_read_and_granted_when_the_read_is_done() -> None:
    machine = machine_of(4, (1, 1))
    assert tell(machine, Acquire(10, 1, 7, key(1))) == [
        Read(0, 1, key(1), 0, 0, G, "demand"),
    ]
    assert tell(machine, ReadDone(25, 0)) == [
        Grant(1, 7, 1, key(1), 0, 1, 0, 0, G, waited_ns=15),
    ]


def test_a_resident_layer_is_granted_at_once_and_to_everybody() -> None:
    machine = machine_of(4, (1, 1))
    tell(machine, Acquire(0, 1, 1, key(0)), ReadDone(5, 0))
    assert tell(machine, Acquire(9, 2, 1, key(0))) == [
        Grant(2, 1, 2, key(0), 0, 1, 0, 0, G, waited_ns=0),
    ]
    assert machine.snapshot().counters.hits == 1


def test_two_clients_that_want_one_layer_share_one_read() -> None:
    machine = machine_of(4, (1, 1))
    assert len(tell(machine, Acquire(0, 1, 1, key(0)), Acquire(1, 2, 1, key(0)))) == 1
    grants = tell(machine, ReadDone(9, 0))
    assert [(grant.client, grant.waited_ns) for grant in grants if isinstance(grant, Grant)] == [
        (1, 9),
        (2, 8),
    ]


def test_a_plan_is_admitted_with_the_charge_of_its_largest_layer_and_fetched_ahead() -> None:
    machine = machine_of(6, (1, 3, 1))
    assert tell(machine, Plan(0, 1, 1, 0, (0, 1, 2))) == [
        Admit(1, 1, 3 * G),
        Read(0, 1, key(0), 0, 0, G, "ahead"),
    ]
    assert tell(machine, ReadDone(1, 0)) == [Read(1, 2, key(1), 0, G, 3 * G, "ahead")]


def test_a_layer_that_is_fetched_ahead_just_becomes_demanded() -> None:
    machine = machine_of(4, (1, 1))
    tell(machine, Plan(0, 1, 1, 0, (0, 1)))
    assert tell(machine, Acquire(1, 1, 2, key(0))) == []
    grants = [action for action in tell(machine, ReadDone(9, 0)) if isinstance(action, Grant)]
    assert [grant.waited_ns for grant in grants] == [8]


def test_a_demand_goes_before_what_is_fetched_ahead() -> None:
    machine = machine_of(6, (1, 1, 1, 1), (1, 1))
    tell(machine, Plan(0, 1, 1, 0, (0, 1, 2, 3)))
    tell(machine, Acquire(1, 2, 1, key(1, model=1)))
    assert tell(machine, ReadDone(9, 0)) == [
        Read(1, 2, key(1, model=1), 0, G, G, "demand"),
    ]


def test_demands_are_served_in_the_order_in_which_they_came() -> None:
    machine = machine_of(8, (1, 1, 1, 1), clients=4)
    for client in (3, 1, 4, 2):
        tell(machine, Acquire(client, client, 1, key(client - 1)))
    order = [
        action.key.layer
        for slot in range(3)
        for action in tell(machine, ReadDone(10 + slot, slot))
        if isinstance(action, Read)
    ]
    assert order == [0, 3, 1]


def test_a_plan_that_does_not_fit_beside_the_others_is_refused_with_the_numbers() -> None:
    machine = machine_of(4, (3, 1), clients=2)
    tell(machine, Plan(0, 1, 1, 0, (0, 1)))
    [refusal] = tell(machine, Plan(0, 2, 1, 0, (0, 1)))
    assert isinstance(refusal, Refuse)
    assert refusal.code == "budget_too_small"
    assert f"needs {3 * G} bytes" in refusal.text
    assert f"{G} of the budget of {4 * G} are available" in refusal.text


def test_a_refused_plan_leaves_the_earlier_one_in_place() -> None:
    machine = machine_of(2, (1, 3))
    tell(machine, Plan(0, 1, 1, 0, (0,)))
    tell(machine, Plan(0, 1, 2, 0, (0, 1)))
    [client, _] = machine.snapshot().clients
    assert (client.model, client.reserved_bytes) == (0, G)


def test_a_layer_ahead_that_would_break_the_reserves_is_answered_later() -> None:
    machine = machine_of(2, (1, 1, 1))
    tell(machine, Plan(0, 1, 1, 0, (0, 1, 2)), Plan(0, 2, 1, 0, (0, 1, 2)), ReadDone(1, 0))
    tell(machine, Acquire(2, 1, 2, key(0)))
    assert Later(1, 3) in tell(machine, Acquire(3, 1, 3, key(1), ahead=True))
    # The same layer is granted as soon as the client has released the other.
    tell(machine, Release(4, 1, 1))
    actions = tell(machine, Acquire(5, 1, 4, key(1)), ReadDone(6, 1))
    assert any(isinstance(action, Grant) and action.request == 4 for action in actions)


def test_a_demand_beyond_the_reserve_is_refused_at_once_and_says_what_to_release() -> None:
    machine = machine_of(2, (1, 1, 1))
    tell(machine, Plan(0, 1, 1, 0, (0, 1, 2)), Plan(0, 2, 1, 0, (0, 1, 2)), ReadDone(1, 0))
    tell(machine, Acquire(2, 1, 2, key(0)))
    [refusal] = [
        a for a in tell(machine, Acquire(3, 1, 3, key(1))) if isinstance(a, Refuse)
    ]  # fmt: skip
    assert refusal.code == "lease_limit"
    assert f"holds {G} bytes in 1 leases" in refusal.text
    assert refusal.text.endswith("release first")


def test_a_demand_beyond_the_reserve_is_granted_where_nobody_else_needs_the_memory() -> None:
    machine = machine_of(3, (1, 1, 1))
    tell(machine, Plan(0, 1, 1, 0, (0, 1, 2)), ReadDone(1, 0), ReadDone(2, 1), ReadDone(3, 2))
    for layer in range(3):
        [grant] = tell(machine, Acquire(4, 1, 2 + layer, key(layer)))
        assert isinstance(grant, Grant)


def test_the_second_lease_of_a_layer_costs_nothing_more() -> None:
    machine = machine_of(1, (1,))
    tell(machine, Plan(0, 1, 1, 0, (0,)), ReadDone(1, 0))
    first = tell(machine, Acquire(2, 1, 2, key(0)))
    second = tell(machine, Acquire(3, 1, 3, key(0)))
    assert [(g.lease, g.slot) for g in [*first, *second] if isinstance(g, Grant)] == [
        (1, 0),
        (2, 0),
    ]
    tell(machine, Release(4, 1, 1))
    assert machine.snapshot().memory.leased_bytes == G
    tell(machine, Release(5, 1, 2))
    assert machine.snapshot().memory.leased_bytes == 0


def test_a_client_without_a_plan_is_admitted_by_its_first_acquire_or_refused() -> None:
    machine = machine_of(2, (2, 1))
    tell(machine, Acquire(0, 1, 1, key(0)))
    [refusal] = tell(machine, Acquire(1, 2, 1, key(1)))
    assert isinstance(refusal, Refuse)
    assert refusal.code == "budget_too_small"


def test_waiting_counts_from_when_the_client_had_nothing_left_to_compute_with() -> None:
    machine = machine_of(4, (1, 1))
    tell(machine, Acquire(0, 1, 1, key(0)), ReadDone(10, 0))
    tell(machine, Acquire(20, 1, 2, key(1), ahead=True))
    tell(machine, Release(50, 1, 1))
    [grant] = tell(machine, ReadDone(70, 1))
    assert isinstance(grant, Grant)
    assert grant.waited_ns == 20
    assert machine.snapshot().clients[0].stall_ns == 10 + 20


def test_a_layer_that_arrives_before_it_is_needed_was_not_waited_for() -> None:
    machine = machine_of(4, (1, 1))
    tell(machine, Acquire(0, 1, 1, key(0)), ReadDone(10, 0))
    [_, grant] = tell(machine, Acquire(20, 1, 2, key(1), ahead=True), ReadDone(30, 1))
    assert isinstance(grant, Grant)
    assert grant.waited_ns == 0


def test_a_leased_layer_is_never_a_victim() -> None:
    machine = machine_of(2, (1, 1, 1))
    tell(machine, Acquire(0, 1, 1, key(0)), ReadDone(1, 0))
    tell(machine, Acquire(2, 2, 1, key(1)), ReadDone(3, 1), Release(4, 2, 2))
    assert tell(machine, Acquire(5, 2, 2, key(2))) == [
        Evict(1, 2, key(1)),
        Read(1, 3, key(2), 0, G, G, "demand"),
    ]


def test_the_layer_that_is_needed_last_gives_way() -> None:
    machine = machine_of(3, (1, 1, 1, 1, 1), clients=1)
    tell(machine, Plan(0, 1, 1, 0, (0, 1, 2, 3, 4)))
    tell(machine, ReadDone(1, 0), ReadDone(2, 1), ReadDone(3, 2))
    tell(machine, Acquire(4, 1, 2, key(0)))
    assert tell(machine, Release(5, 1, 1)) == [
        Evict(0, 1, key(0)),
        Read(0, 4, key(3), 0, 0, G, "ahead"),
    ]


def test_nothing_is_evicted_for_a_layer_that_is_needed_later() -> None:
    machine = machine_of(3, (1, 1, 1, 1, 1), clients=1)
    tell(machine, Plan(0, 1, 1, 0, (0, 1, 2, 3, 4)))
    actions = tell(machine, ReadDone(1, 0), ReadDone(2, 1))
    assert [type(action) for action in actions] == [Read, Read]
    assert tell(machine, ReadDone(3, 2)) == []


def test_a_plan_waits_for_what_others_hold_beyond_their_reserves() -> None:
    machine = machine_of(2, (1, 1, 1))
    tell(machine, Plan(0, 1, 1, 0, (0, 1, 2)), ReadDone(1, 0), ReadDone(2, 1))
    tell(machine, Acquire(3, 1, 2, key(0)), Acquire(3, 1, 3, key(1), ahead=True))
    assert tell(machine, Plan(4, 2, 1, 0, (0, 1, 2))) == []
    # Nobody gets more beyond its reserve meanwhile.
    assert Admit(2, 1, G) in tell(machine, Release(5, 1, 1))


def test_a_plan_that_waited_too_long_is_refused_with_the_numbers() -> None:
    machine = machine_of(2, (1, 1, 1))
    tell(machine, Plan(0, 1, 1, 0, (0, 1, 2)), ReadDone(1, 0), ReadDone(2, 1))
    tell(machine, Acquire(3, 1, 2, key(0)), Acquire(3, 1, 3, key(1), ahead=True))
    tell(machine, Plan(4, 2, 1, 0, (0, 1, 2)))
    assert tell(machine, Tick(1_999_999_999)) == []
    [refusal] = tell(machine, Tick(2_000_000_004))
    assert isinstance(refusal, Refuse)
    assert (refusal.client, refusal.code) == (2, "budget_too_small")


def test_while_a_plan_waits_nobody_takes_more_than_its_reserve() -> None:
    machine = machine_of(3, (1, 1, 1, 1), (3,), clients=3)
    tell(machine, Plan(0, 1, 1, 0, (0, 1, 2, 3)), Plan(0, 2, 1, 0, (0, 1, 2, 3)))
    tell(machine, ReadDone(1, 0), ReadDone(2, 1), ReadDone(3, 2))
    tell(machine, Acquire(3, 1, 2, key(0)), Acquire(3, 1, 3, key(1), ahead=True))
    assert tell(machine, Plan(4, 3, 1, 0, (0, 1))) == []
    tell(machine, Acquire(5, 2, 2, key(0)))
    assert Later(2, 3) in tell(machine, Acquire(5, 2, 3, key(1), ahead=True))
    assert Admit(3, 1, G) in tell(machine, Release(6, 1, 1))


@pytest.mark.parametrize(
    ("event", "code"),
    [(ModelRemoved(5, 0), "model_removed"), (Plan(5, 2, 2, 0, (0,)), "bad_request")],
)
def test_a_waiting_plan_is_answered_when_it_can_no_longer_be_kept(event: Event, code: str) -> None:
    machine = machine_of(2, (1, 1, 1))
    tell(machine, Plan(0, 1, 1, 0, (0, 1, 2)), ReadDone(1, 0), ReadDone(2, 1))
    tell(machine, Acquire(3, 1, 2, key(0)), Acquire(3, 1, 3, key(1), ahead=True))
    tell(machine, Plan(4, 2, 1, 0, (0, 1, 2)))
    refusals = [action for action in tell(machine, event) if isinstance(action, Refuse)]
    assert [(refusal.request, refusal.code) for refusal in refusals] == [(1, code)]
    tell(machine, ClientGone(6, 2))


def test_a_failed_read_is_told_to_everybody_who_waits_and_frees_the_slot() -> None:
    machine = machine_of(2, (1, 1))
    tell(machine, Acquire(0, 1, 1, key(0)), Acquire(0, 2, 1, key(0)))
    assert tell(machine, ReadFailed(5, 0, "checksum_mismatch", "block 3 of layer 0")) == [
        Refuse(1, 1, "checksum_mismatch", "block 3 of layer 0"),
        Refuse(2, 1, "checksum_mismatch", "block 3 of layer 0"),
        Evict(0, 1, key(0)),
    ]
    assert machine.snapshot().memory.reserved_bytes == 2 * G  # their admission stays


def test_a_failed_layer_is_not_fetched_ahead_again_until_somebody_demands_it() -> None:
    machine = machine_of(4, (1, 1))
    tell(machine, Plan(0, 1, 1, 0, (0, 1)))
    actions = tell(machine, ReadFailed(1, 0, "read_failed", "EIO"), ReadDone(2, 0))
    assert [action.key.layer for action in actions if isinstance(action, Read)] == [1]
    [read] = tell(machine, Acquire(3, 1, 2, key(0)))
    assert isinstance(read, Read)
    assert (read.key, read.reason) == (key(0), "demand")


def test_cold_addresses_are_used_only_after_as_much_was_discarded_elsewhere() -> None:
    """Two layers of 2 granules leave [0, 2) and [4, 6) free: no 3 in a row are warm."""
    machine = machine_of(6, (2, 2, 2), (3,), warm=6, clients=2)
    for layer in range(3):
        tell(machine, Acquire(layer, 1, layer, key(layer)), ReadDone(layer, layer))
    tell(machine, Release(5, 1, 1), Release(5, 1, 3))
    actions = tell(machine, Acquire(6, 2, 1, key(0, model=1)))
    assert [type(action) for action in actions] == [Evict, Evict, Discard]
    [discard] = [action for action in actions if isinstance(action, Discard)]
    assert discard.nbytes == G
    assert machine.snapshot().memory.used_bytes == 6 * G
    [read] = tell(machine, DiscardDone(7, discard.arena, discard.offset, discard.nbytes))
    assert isinstance(read, Read)
    assert read.nbytes == 3 * G
    assert machine.snapshot().memory.used_bytes == 6 * G


def test_small_layers_share_a_granule() -> None:
    machine = TierMachine(CoreConfig(2 * G, reads_in_flight=4))
    tell(machine, ArenaAdded(0, 0, 64 * G, 2 * G), ModelAdded(0, 0, "m", 0, (4096, 8192, G)))
    tell(machine, ClientJoined(0, 1))
    reads = [a for a in tell(machine, Plan(0, 1, 1, 0, (0, 1, 2))) if isinstance(a, Read)]
    assert [(read.key.layer, read.offset) for read in reads] == [(0, G), (1, G + 4096), (2, 0)]


def test_removing_a_model_refuses_who_waits_and_spares_who_leases() -> None:
    machine = machine_of(4, (1, 1, 1))
    tell(machine, Acquire(0, 1, 1, key(0)), ReadDone(1, 0))
    tell(machine, Acquire(2, 2, 1, key(1)))
    [refusal] = tell(machine, ModelRemoved(3, 0))
    assert isinstance(refusal, Refuse)
    assert (refusal.client, refusal.code) == (2, "model_removed")
    assert tell(machine, ReadDone(4, 1)) == [Evict(1, 2, key(1))]
    assert tell(machine, Release(5, 1, 1)) == [Evict(0, 1, key(0))]
    assert machine.snapshot().models == {}
    [refusal] = tell(machine, Acquire(6, 1, 2, key(0)))
    assert isinstance(refusal, Refuse)
    assert refusal.code == "model_removed"


def test_a_client_that_is_gone_leaves_nothing_behind() -> None:
    machine = machine_of(4, (1, 1, 1))
    tell(machine, Plan(0, 1, 1, 0, (0, 1, 2)), ReadDone(1, 0), Acquire(2, 1, 2, key(0)))
    tell(machine, Acquire(3, 1, 3, key(2), ahead=True), ClientGone(4, 1))
    snapshot = machine.snapshot()
    assert snapshot.memory.leased_bytes == snapshot.memory.reserved_bytes == 0
    assert tell(machine, ReadDone(5, 1)) == []
    assert [client.client for client in snapshot.clients] == [2]


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_the_machine_is_quiet_while_a_planned_client_is_silent(lookahead: int) -> None:
    machine = machine_of(3, (1,) * 8)
    reads = [a for a in tell(machine, Plan(0, 1, 1, 0, tuple(range(8)), "cyclic", lookahead)) if a]
    slots = [action.slot for action in reads if isinstance(action, Read)]
    for _ in range(50):
        if not slots:
            break
        done = slots.pop(0)
        slots += [a.slot for a in tell(machine, ReadDone(1, done)) if isinstance(a, Read)]
    assert not slots
    assert machine.snapshot().counters.reads == 3


# ----------------------------------------------------------------------------------- illegal events


@pytest.mark.parametrize(
    "event",
    [
        ArenaAdded(9, 0, G),
        ArenaAdded(9, 1, G, 2 * G),
        ArenaAdded(9, 1, 64 * G, 64 * G),
        ModelAdded(9, 0, "again", 0, (G,)),
        ModelAdded(9, 5, "nowhere", 3, (G,)),
        ModelAdded(9, 5, "odd", 0, (4095,)),
        ModelAdded(9, 5, "empty", 0, (0,)),
        ModelRemoved(9, 4),
        ClientJoined(9, 1),
        ClientGone(9, 8),
        Plan(9, 8, 1, 0, (0,)),
        Acquire(9, 8, 1, key(0)),
        Release(9, 8, 1),
        Release(9, 1, 999),
        Release(9, 2, 1),
        ReadDone(9, 0),
        ReadDone(9, 17),
        ReadFailed(9, 17, "read_failed", "EIO"),
        DiscardDone(9, 0, 0, G),
        Adopted(9, ()),
    ],
    ids=lambda event: f"{type(event).__name__}",
)
def test_an_illegal_event_raises_and_changes_nothing(event: Event) -> None:
    machine = machine_of(3, (1, 1, 1))
    tell(machine, Acquire(0, 1, 1, key(0)), ReadDone(1, 0), Acquire(2, 2, 1, key(1)))
    before = (machine.snapshot(), [str(decision) for decision in machine.story()])
    twin = copy.deepcopy(machine)
    with pytest.raises(IllegalEvent):
        machine.handle(event)
    machine.check()
    assert (machine.snapshot(), [str(decision) for decision in machine.story()]) == before
    for legal in (ReadDone(10, 1), Release(11, 1, 1), Acquire(12, 1, 2, key(2))):
        assert machine.handle(legal) == twin.handle(legal)


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (Plan(0, 1, 1, 9, (0,)), "not_found"),
        (Plan(0, 1, 1, 0, ()), "bad_request"),
        (Plan(0, 1, 1, 0, (0, 3)), "bad_request"),
        (Plan(0, 1, 1, 0, (-1,)), "bad_request"),
        (Plan(0, 1, 1, 0, (0,), "cyclic", -1), "bad_request"),
        (Acquire(0, 1, 1, key(0, model=9)), "not_found"),
        (Acquire(0, 1, 1, key(3)), "not_found"),
        (Acquire(0, 1, 1, key(-1)), "not_found"),
    ],
)
def test_what_a_client_may_get_wrong_is_refused_with_a_code(event: Event, code: str) -> None:
    [refusal] = tell(machine_of(3, (1, 1, 1)), event)
    assert isinstance(refusal, Refuse)
    assert refusal.code == code


def test_the_story_of_a_layer_says_why() -> None:
    machine = machine_of(1, (1, 1), clients=1)
    tell(machine, Acquire(0, 1, 1, key(0)), ReadDone(1, 0), Release(2, 1, 1))
    tell(machine, Acquire(3, 1, 2, key(1)))
    story = [str(decision) for decision in machine.story(key(0))]
    assert story[-1] == "0.000000 evict 0/0: for 0/1: no plan uses it"
    assert [line.split()[1] for line in story] == ["wait", "read", "resident", "grant", "evict"]


def test_an_illegal_event_tells_the_story_of_its_layer() -> None:
    machine = machine_of(1, (1, 1), clients=1)
    tell(machine, Acquire(0, 1, 1, key(0)), ReadDone(1, 0))
    with pytest.raises(IllegalEvent, match="slot 0 is not being read") as caught:
        machine.handle(ReadDone(2, 0))
    assert [decision.what for decision in caught.value.story] == [
        "wait",
        "read",
        "resident",
        "grant",
    ]


def test_layers_beside_a_plan_count_for_its_reserve_and_are_not_fetched() -> None:
    machine = machine_of(4, (1, 3, 1), clients=1)
    actions = tell(machine, Plan(0, 1, 1, 0, (0,), beside=(1,)), ReadDone(0, 0))
    assert Admit(1, 1, 3 * G) in actions
    assert [action.key for action in actions if isinstance(action, Read)] == [key(0)]
    assert tell(machine, Plan(1, 1, 2, 0, (0,), beside=(9,)))[0] == Refuse(
        1,
        2,
        "bad_request",
        "a plan over model 'm0' needs layers 0 to 2 and a lookahead >= 0; this one has layer 9",
    )
