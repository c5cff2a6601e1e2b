"""What is written is what is read, also by a later version."""

from __future__ import annotations

import json

import pytest

from tierd.core.errors import UnknownRecord
from tierd.core.model import (
    Acquire,
    Adopted,
    AdoptedSlot,
    ClientJoined,
    Grant,
    LayerKey,
    Plan,
    Refuse,
)
from tierd.core.transcript import SCHEMA, plain, restored
from tierd.sim.scenario import drawn
from tierd.sim.simulation import Simulation


@pytest.mark.parametrize(
    "record",
    [
        Acquire(5, 1, 2, LayerKey(3, 4), ahead=True),
        Plan(5, 1, 2, 3, (4, 5, 6)),
        Plan(5, 1, 2, 3, ()),
        Adopted(5, (AdoptedSlot(1, 0, 0, 4096, 7, LayerKey(1, 2), (10, 11)),)),
        Adopted(5, (AdoptedSlot(1, 0, 0, 4096, 7, None, ()),)),
        Grant(1, 2, 3, LayerKey(3, 4), 5, 6, 7, 8, 9, 10),
        Refuse(1, 2, "read_failed", "@Acquire is no record here"),
    ],
)
def test_a_record_survives_json(record: object) -> None:
    assert restored(json.loads(json.dumps(plain(record)))) == record


@pytest.mark.parametrize("seed", range(6))
def test_everything_that_a_simulation_does_survives_json(seed: int) -> None:
    simulation = Simulation(drawn(seed, clients=2, steps=10), check=False)
    simulation.run()
    entries = list(simulation.machine.record.entries())
    written = [plain((entry.event, entry.actions)) for entry in entries]
    read = [restored(one) for one in json.loads(json.dumps(written))]
    assert read == [(entry.event, entry.actions) for entry in entries]


def test_fields_that_are_new_since_then_get_their_defaults() -> None:
    older = {**SCHEMA, "ClientJoined": ("at_ns", "client")}
    assert restored(["@ClientJoined", 5, 1], older) == ClientJoined(5, 1)


@pytest.mark.parametrize(
    ("value", "schema", "text"),
    [
        (["@Teleport", 1], SCHEMA, "'Teleport'"),
        (["@Release", 1, 2], SCHEMA, "a Release has 2 values, its schema 3"),
        (["@Release", 1, 2], {"Release": ("at_ns", "client")}, "no 'lease'"),
        (["@Tick", 1, 2], {"Tick": ("at_ns", "moon")}, "'moon'"),
    ],
)
def test_what_is_not_known_is_named(
    value: list[object], schema: dict[str, tuple[str, ...]], text: str
) -> None:
    with pytest.raises(UnknownRecord, match=text):
        restored(value, schema)
