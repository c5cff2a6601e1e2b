"""Seeds: whatever is drawn, the promises hold. A failing one names the command that replays it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tierd.core.errors import CoreError
from tierd.core.model import Evict, LayerKey, Read
from tierd.sim.__main__ import main, replay_command
from tierd.sim.errors import BrokenPromise
from tierd.sim.scenario import Device, Model, Scenario, cycle, drawn
from tierd.sim.simulation import Simulation
from tierd.sim.virtual_client import Profile
from tierd.sim.world import World

if TYPE_CHECKING:
    from tierd.sim.summaries import Summary

G = 2 << 20
BLOCK = 40


def run(scenario: Scenario, replay: str = "") -> Summary:
    try:
        return Simulation(scenario).run()
    except (BrokenPromise, CoreError) as error:
        raise AssertionError(f"{error}\nreplay: {replay}") from error


@pytest.mark.parametrize("first", range(0, 400, BLOCK))
def test_every_promise_holds_for_every_seed(first: int) -> None:
    for seed in range(first, first + BLOCK):
        run(drawn(seed), replay_command(seed))


@pytest.mark.parametrize("first", range(10_000, 10_060, 20))
def test_every_promise_holds_for_a_crowd(first: int) -> None:
    for seed in range(first, first + 20):
        run(drawn(seed, clients=16, steps=12), replay_command(seed, clients=16, steps=12))


def test_the_same_seed_gives_the_same_run() -> None:
    for seed in (3, 27, 46):
        runs = [Simulation(drawn(seed)) for _ in range(2)]
        assert runs[0].run() == runs[1].run()
        assert [str(d) for d in runs[0].machine.story()] == [
            str(d) for d in runs[1].machine.story()
        ]


@pytest.mark.parametrize("start_ns", [0, 1_000_000, 7_300_000])
@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_two_clients_out_of_phase_progress_in_a_budget_of_three_layers(
    start_ns: int, lookahead: int
) -> None:
    client = Profile(0, tuple(range(8)), lookahead=lookahead, steps=80)
    other = replace(client, start_ns=start_ns, order=(4, 5, 6, 7, 0, 1, 2, 3))
    model = Model(0, 0, (G,) * 8)
    summary = run(Scenario(3 * G, (model,), (client, other)))
    assert summary.layers == 160


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_exactly_the_admitted_minimum_is_enough(clients: int) -> None:
    """Nothing is left for lookahead: every layer ahead is answered later."""
    model = Model(0, 0, (3 * G, 2 * G, 5 * G, G, 4096))
    profiles = tuple(
        Profile(0, (0, 1, 2, 3, 4), steps=25, start_ns=i * 3_000_000) for i in range(clients)
    )
    summary = run(Scenario(5 * G * clients, (model,), profiles))
    assert summary.layers == 25 * clients
    assert summary.peak_bytes <= 5 * G * clients


@pytest.mark.parametrize("hoards_after", [0, 1, 3])
def test_clients_that_never_release_harm_only_themselves(hoards_after: int) -> None:
    model = Model(0, 0, (G,) * 6)
    order = tuple(range(6))
    hoarder = Profile(0, order, steps=30, hoards_after=hoards_after, start_ns=2_000_000)
    good = Profile(0, order, steps=60)
    simulation = Simulation(Scenario(4 * G, (model,), (good, hoarder, hoarder)))
    simulation.run()
    assert simulation.clients[0].done == 60
    assert simulation.clients[0].refusals == []


@pytest.mark.parametrize("layer", [1, 3, 4])
def test_fragments_never_block_progress(layer: int) -> None:
    """Layers of 2, 3, 5 and 7 granules in turn: the free ranges never fit, the budget does."""
    sizes = (2 * G, 7 * G, 3 * G, 5 * G, layer * G, 7 * G, 2 * G)
    model = Model(0, 0, sizes)
    clients = tuple(
        Profile(0, order, steps=70, start_ns=i * 1_700_000, lookahead=1)
        for i, order in enumerate([(0, 1, 2, 3, 4, 5, 6), (6, 3, 1, 0, 5, 2, 4)])
    )
    summary = run(Scenario(15 * G, (model,), clients))
    assert summary.layers == 140
    assert summary.discards > 0
    assert summary.peak_bytes <= 15 * G


def test_an_arena_without_address_space_refuses_and_says_so() -> None:
    """A span of exactly the budget: a leased layer in the middle leaves no room for a large one."""
    model = Model(0, 0, (2 * G, 2 * G, 2 * G, 4 * G))
    small = Profile(0, (0, 1, 2), steps=9, hoards_after=0, lookahead=0)
    large = Profile(0, (3,), steps=3, start_ns=50_000_000)
    simulation = Simulation(Scenario(10 * G, (model,), (small, large), spans=(10 * G,)))
    simulation.run()
    assert simulation.clients[1].done == 3 or simulation.clients[1].refusals == ["internal"]


def test_without_address_space_nothing_is_evicted_for_what_finds_no_place() -> None:
    """Seed 23981 once read two layers in turn for ever: each was evicted for a third layer, which
    then found no contiguous addresses in a span of exactly the budget."""
    run(drawn(23981), replay_command(23981))


def test_clients_that_die_at_any_moment_leave_nothing() -> None:
    model = Model(0, 0, (G,) * 6)
    for dies_ns in range(0, 30_000_000, 700_000):
        doomed = Profile(0, tuple(range(6)), dies_ns=dies_ns, lookahead=2)
        run(Scenario(4 * G, (model,), (doomed, replace(doomed, dies_ns=None, steps=12))))


def test_errors_of_the_disk_reach_the_clients_and_nothing_else() -> None:
    scenario = replace(cycle(6, 3, steps=60), device=Device(error_share=0.2), seed=5)
    simulation = Simulation(scenario)
    assert simulation.run().layers == 60
    assert "read_failed" in simulation.clients[0].refusals


def test_the_command_line_prints_a_summary_and_replays_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["--seed", "3", "--runs", "2"]) == 0
    assert capsys.readouterr().out.count("grants") == 2

    def broken(self: World, action: Evict) -> None:
        raise BrokenPromise(f"{action} on purpose")

    monkeypatch.setattr(World, "evict", broken)
    assert main(["--seed", "3", "--clients", "4"]) == 1
    assert "replay: python -m tierd.sim --seed 3 --clients 4" in capsys.readouterr().err


def test_the_world_notices_what_the_machine_must_never_do() -> None:
    """The checker is itself checked: each of these is a way to corrupt a client's data."""
    world = World(2 * G, G)
    world.spans[0] = 8 * G
    read = Read(0, 1, LayerKey(0, 0), 0, 0, G, "demand")
    world.read(read)
    with pytest.raises(BrokenPromise, match="overwrites slot 0"):
        world.read(replace(read, slot=1, generation=2))
    with pytest.raises(BrokenPromise, match="uses generation 1 again"):
        world.read(replace(read, slot=1, offset=G))
    with pytest.raises(BrokenPromise, match="not empty"):
        world.read(replace(read, generation=3, offset=G))
    world.read(replace(read, slot=1, generation=4, offset=G))
    with pytest.raises(BrokenPromise, match="the budget is 2"):
        world.read(replace(read, slot=2, generation=5, offset=2 * G))
