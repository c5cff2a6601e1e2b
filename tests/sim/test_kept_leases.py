"""Leases that clients keep hold nobody up for longer than it takes to give them back."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tierd.core.budget import Budget
from tierd.core.emptying import Emptier
from tierd.core.model import Admit, Plan, Refuse
from tierd.sim.__main__ import replay_command
from tierd.sim.errors import BrokenPromise
from tierd.sim.scenario import Model, Scenario, drawn
from tierd.sim.simulation import Simulation
from tierd.sim.virtual_client import Profile

G = 2 << 20
MS = 1_000_000


def keepers(seed: int) -> Scenario:
    """Clients of some models, who come one after the other, hold nothing ahead and keep all that
    they had for as long as they may. All reserves fit at once."""
    rng = random.Random(f"keepers {seed}")
    models = tuple(
        Model(number, 0, tuple(G * rng.randint(1, 6) for _ in range(rng.randint(2, 10))))
        for number in range(rng.randint(1, 3))
    )
    clients = []
    for _ in range(rng.randint(2, 6)):
        model = rng.choice(models)
        clients.append(
            Profile(
                model.number,
                tuple(range(len(model.layer_bytes))),
                lookahead=0,
                steps=rng.randint(20, 80),
                compute_ns=rng.randint(1, 5) * MS,
                start_ns=rng.randint(0, 300) * MS,
                keeps=True,
                answer_ns=rng.randint(0, 60) * MS,
            )
        )
    least = sum(max(models[client.model].layer_bytes) for client in clients)
    total = sum(sum(model.layer_bytes) for model in models)
    budget = least + rng.randint(0, total // G) * G
    return Scenario(budget, models, tuple(clients), seed)


@pytest.mark.parametrize("first", range(0, 100, 25))
def test_a_plan_waits_for_kept_leases_no_longer_than_their_clients_take_to_answer(
    first: int,
) -> None:
    waited = 0
    for seed in range(first, first + 25):
        scenario = keepers(seed)
        simulation = Simulation(scenario)
        simulation.run()
        slowest_ns = max(client.answer_ns for client in scenario.clients)
        asked: dict[int, int] = {}
        for entry in simulation.machine.record.entries():
            if isinstance(entry.event, Plan):
                asked[entry.event.client] = entry.at_ns
            for action in entry.actions:
                # A client that still keeps what it should have given back waits for itself.
                refused = isinstance(action, Refuse) and action.code != "lease_limit"
                assert not refused, f"seed {seed}: {action}"
                if isinstance(action, Admit):
                    wait_ns = entry.at_ns - asked[action.client]
                    assert wait_ns <= slowest_ns, f"seed {seed}: client {action.client}"
                    waited += wait_ns > 0
    assert waited > 0, "nobody kept anything that somebody else needed"


def broken(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "nobody is pressed":
        monkeypatch.setattr(Budget, "pressed", property(lambda self: False))
    elif how == "only waiting plans press":
        pressed = property(lambda self: bool(self._books.awaiting))
        monkeypatch.setattr(Budget, "pressed", pressed)
    else:
        monkeypatch.setattr(Emptier, "shrink", lambda self: None)


@pytest.mark.parametrize(
    "how",
    [
        "nobody is pressed",
        "only waiting plans press",
        "what is above the budget stays",
    ],
)
def test_the_simulation_notices_a_machine_that_keeps_its_word_less_well(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks are checked: each of these machines breaks a promise on some of the seeds."""
    broken(monkeypatch, how)
    with pytest.raises(BrokenPromise):
        run_all(60)


def run_all(seeds: int) -> None:
    for seed in range(seeds):
        Simulation(drawn(seed), check=False).run()


def test_the_command_that_replays_a_seed_draws_the_same_budgets_and_keepers() -> None:
    one, other = drawn(7), drawn(7)
    assert one == other
    assert "--seed 7" in replay_command(7)
    kept = [seed for seed in range(40) if any(client.keeps for client in drawn(seed).clients)]
    changed = [seed for seed in range(40) if drawn(seed).budgets]
    assert len(kept) > 10
    assert len(changed) > 10


def test_clients_that_keep_leases_compute_the_same_layers_as_those_that_do_not() -> None:
    for seed in range(20):
        scenario = keepers(seed)
        others = tuple(replace(client, keeps=False) for client in scenario.clients)
        kept = Simulation(scenario).run()
        released = Simulation(replace(scenario, clients=others)).run()
        assert kept.layers == released.layers, f"seed {seed}"
        assert kept.grants <= released.grants
