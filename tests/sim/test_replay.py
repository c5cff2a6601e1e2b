"""A recorded day comes out as it was under what it was recorded with, and as it must elsewhere."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from tierd.core.machine import TierMachine
from tierd.core.model import (
    Acquire,
    ClientGone,
    ClientJoined,
    CoreConfig,
    Grant,
    Later,
    LayerKey,
    ModelAdded,
    Plan,
    Release,
    WeightChanged,
)
from tierd.sim.errors import BadRecording
from tierd.sim.recording import Moment, Recording
from tierd.sim.replay import POLICIES, Replay, replay
from tierd.sim.replay_policies import DEMAND_POLICIES
from tierd.sim.scenario import Device, Model, Scenario, cycle, drawn
from tierd.sim.simulation import Simulation
from tierd.sim.virtual_client import Profile
from tierd.sim.workload import clients_of

if TYPE_CHECKING:
    from tierd.core.model import Action, Event

LAYER = 2 << 20
MS = 1_000_000


def recorded(scenario: Scenario) -> tuple[Simulation, Recording]:
    """A simulated day that the record holds whole."""
    simulation = Simulation(scenario, check=False)
    config = dataclasses.replace(simulation.machine.config, story_length=1_000_000)
    simulation.machine = TierMachine(config)
    simulation.run()
    recording = Recording.of(simulation.machine)
    assert simulation.machine.record.extent.first == 0
    return simulation, recording


def day(capacity: int = 12, layers: int = 24, passes: int = 3, **profile: object) -> Scenario:
    device = Device(bandwidth=2_000_000_000, latency_ns=0, discard_ns=0)
    scenario = cycle(layers, capacity, steps=layers * passes, **profile)  # type: ignore[arg-type]
    return dataclasses.replace(scenario, device=device)


# ----------------------------------------------------------------------------------- what was done


def moments(*told: tuple[Event, list[Action]]) -> tuple[Moment, ...]:
    return tuple(Moment(event.at_ns, event, tuple(actions)) for event, actions in told)


def grant(request: int, layer: int) -> Grant:
    return Grant(1, request, request, LayerKey(0, layer), 0, 0, 0, 0, LAYER, 0)


def test_compute_times_leave_stalls_and_pauses_out() -> None:
    recording = Recording(
        CoreConfig(4 * LAYER),
        (ModelAdded(0, 0, "m", 0, (LAYER,) * 4),),
        moments(
            (ClientJoined(100, 1, 50), []),
            (Acquire(110, 1, 1, LayerKey(0, 0)), []),
            (Acquire(112, 1, 2, LayerKey(0, 1), True), [grant(1, 0)]),  # stands for a ReadDone
            (Acquire(120, 1, 3, LayerKey(0, 2), True), [Later(1, 3)]),
            (Release(130, 1, 1), []),  # computed with layer 0 from 112 to 130
            (Acquire(140, 1, 4, LayerKey(0, 2), True), [grant(2, 1)]),  # stalled until 140
            (Release(145, 1, 2), [grant(4, 2)]),
            (Acquire(150, 1, 5, LayerKey(0, 3)), []),  # never granted: no use
            (WeightChanged(155, 1, 70), []),
            (ClientGone(160, 1), []),
        ),
    )
    (client,) = clients_of(recording)
    assert (client.weight, client.joined_ns) == (70, 100)
    assert [use.key.layer for use in client.uses] == [0, 1, 2]
    assert [use.pause_ns for use in client.uses] == [10, 0, 0]
    assert [use.compute_ns for use in client.uses] == [18, 5, 15]
    assert [use.trigger for use in client.uses] == [0, 0, 0]  # layer 2 was put off, asked at 120
    assert [use.at_turn for use in client.uses] == [True, False, False]


def test_plans_are_said_before_the_use_that_followed_them() -> None:
    recording = Recording(
        CoreConfig(4 * LAYER),
        (ModelAdded(0, 0, "m", 0, (LAYER,) * 4), ClientJoined(0, 1), Plan(1, 1, 9, 0, (0, 1))),
        moments(
            (Acquire(10, 1, 1, LayerKey(0, 0)), [grant(1, 0)]),
            (Release(20, 1, 1), []),
            (Plan(30, 1, 2, 0, (1, 0)), []),
            (Acquire(40, 1, 3, LayerKey(0, 1)), [grant(3, 1)]),
        ),
    )
    (client,) = clients_of(recording)
    assert {
        index: [plan.order for plan in said if isinstance(plan, Plan)]
        for index, said in client.says.items()
    } == {0: [(0, 1)], 1: [(1, 0)]}


# ------------------------------------------------------------------------------------------ replay


@pytest.mark.parametrize("compute_ns", [MS // 10, 5 * MS])
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_the_core_does_again_what_it_did(compute_ns: int, lookahead: int) -> None:
    scenario = day(compute_ns=compute_ns, lookahead=lookahead)
    simulation, recording = recorded(scenario)
    run = Replay(recording, "next-use", scenario.budget_bytes, 2_000_000_000)
    run.run()
    summary, figures = simulation.summary(), run.figures()
    assert figures.uses == summary.grants
    assert figures.read_bytes == pytest.approx(summary.read_bytes, rel=0.03)
    assert figures.compute_ns == pytest.approx(summary.layers * compute_ns, rel=0.01)
    assert figures.elapsed_ns == pytest.approx(summary.virtual_seconds * 1e9, rel=0.05)


def test_the_bandwidth_is_that_of_the_recorded_reads() -> None:
    _, recording = recorded(day(compute_ns=MS // 10))
    bandwidth = recording.bandwidth()
    assert bandwidth == pytest.approx(2e9, rel=0.05)


def test_every_policy_has_a_row_and_none_beats_the_bound() -> None:
    _, recording = recorded(day(compute_ns=MS // 10))
    rows = {row.policy: row for row in replay(recording, POLICIES)}
    assert list(rows) == list(POLICIES)
    assert len({(row.uses, row.asked_bytes) for row in rows.values()}) == 1
    for policy in POLICIES[:-1]:
        assert rows[policy].read_bytes >= rows["min"].read_bytes
        assert rows[policy].stall_ns >= rows["min"].stall_ns
        assert rows[policy].elapsed_ns >= rows["min"].elapsed_ns
    assert rows["lru"].hit_ratio == 0
    assert rows["next-use"].read_bytes < rows["lru"].read_bytes
    assert rows["next-use"].stall_ns < rows["lru"].stall_ns


def test_a_larger_budget_reads_less_and_one_that_holds_everything_reads_it_once() -> None:
    _, recording = recorded(day())
    sizes = [6, 12, 18, 24]
    read = [replay(recording, ["next-use"], budget_bytes=n * LAYER)[0].read_bytes for n in sizes]
    assert read == sorted(read, reverse=True)
    for row in replay(recording, POLICIES, budget_bytes=24 * LAYER):
        assert row.read_bytes == 24 * LAYER


def test_a_slower_device_means_more_stall_and_the_same_bytes_on_demand() -> None:
    _, recording = recorded(day())
    fast, slow = (
        replay(recording, ["lru"], bandwidth=rate)[0] for rate in (10_000_000_000, 200_000_000)
    )
    assert slow.stall_ns > 5 * fast.stall_ns
    assert slow.read_bytes == fast.read_bytes


def test_a_budget_below_the_largest_layer_leaves_the_client_out_and_says_so() -> None:
    _, recording = recorded(day())
    for row in replay(recording, ["next-use", "lru"], budget_bytes=LAYER // 2):
        assert row.uses == 0
        assert "budget_too_small" in row.refused[0]


def test_several_models_clients_and_speeds_come_to_an_end_under_every_policy() -> None:
    models = (Model(0, 0, (LAYER,) * 24), Model(1, 0, (2 * LAYER,) * 10))
    clients = (
        Profile(0, tuple(range(24)), steps=100, compute_ns=MS),
        Profile(1, tuple(range(10)), steps=80, compute_ns=3 * MS, lookahead=0),
        Profile(0, tuple(range(24)), steps=100, start_ns=20 * MS, lookahead=2, compute_ns=2 * MS),
    )
    _, recording = recorded(Scenario(20 * LAYER, models, clients, seed=3))
    for budget in (6 * LAYER, 20 * LAYER, 60 * LAYER):
        rows = {row.policy: row for row in replay(recording, POLICIES, budget_bytes=budget)}
        assert not any(row.refused for row in rows.values())
        assert len({row.asked_bytes for row in rows.values()}) == 1
        assert rows["next-use"].read_bytes >= rows["min"].read_bytes


@pytest.mark.parametrize("seed", range(25))
def test_unruly_days_can_be_replayed_too(seed: int) -> None:
    simulation = Simulation(drawn(seed, steps=15), check=False)
    simulation.run()
    recording = Recording.of(simulation.machine)
    if not clients_of(recording):
        with pytest.raises(BadRecording, match="nothing to replay"):
            replay(recording, ["lru"], bandwidth=10**9)
        return
    for policy in ("next-use", *DEMAND_POLICIES):
        (row,) = replay(recording, [policy], bandwidth=10**9)
        assert row.uses >= 0
        assert row.read_bytes >= 0


def test_a_weight_that_changed_is_the_clients_from_the_start_of_the_run() -> None:
    """A run has numbers of its own for clients: the event itself would name somebody else."""
    _, recording = recorded(day())
    before = recording.moments
    place = next(i for i, moment in enumerate(before) if isinstance(moment.event, ClientJoined))
    joined = before[place].event
    assert isinstance(joined, ClientJoined)
    changed = Moment(before[place].at_ns, WeightChanged(joined.at_ns, joined.client, 300), ())
    moments = (*before[: place + 1], changed, *before[place + 1 :])
    again = dataclasses.replace(recording, moments=moments)
    assert [client.weight for client in clients_of(again)].count(300) == 1
    assert replay(again, ["next-use"])[0].uses == replay(recording, ["next-use"])[0].uses


def test_a_day_whose_budget_changed_is_run_again_under_the_last_one() -> None:
    scenario = dataclasses.replace(day(), budgets=((20 * MS, 8 * LAYER), (30 * MS, LAYER // 2)))
    simulation, recording = recorded(scenario)
    assert recording.budget_bytes == simulation.machine.budget_bytes == 8 * LAYER
    assert recording.config.budget_bytes == 12 * LAYER
    [figures] = replay(recording, ["next-use"])
    assert figures.budget_bytes == 8 * LAYER
    [other] = replay(dataclasses.replace(recording, moments=recording.moments), ["lru"])
    assert other.budget_bytes == 8 * LAYER


def test_a_day_of_clients_that_kept_their_leases_takes_as_long_again() -> None:
    scenario = day(capacity=26, keeps=True)
    simulation, recording = recorded(scenario)
    [figures] = replay(recording, ["next-use"])
    assert figures.uses == 24, "what was kept is one use"
    assert figures.read_bytes == 24 * LAYER
    assert abs(figures.elapsed_ns - simulation.now) < 60 * MS


def test_the_same_recording_gives_the_same_rows() -> None:
    _, recording = recorded(day())
    assert replay(recording, POLICIES) == replay(recording, POLICIES)


def test_what_cannot_be_replayed_is_refused() -> None:
    nothing = Recording(CoreConfig(LAYER), (), ())
    with pytest.raises(BadRecording, match="no finished read"):
        replay(nothing, ["lru"])
    with pytest.raises(BadRecording, match="no client"):
        replay(nothing, ["lru"], bandwidth=1)
