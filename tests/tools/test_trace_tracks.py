"""The trace keeps the rules of the format, and its tracks tell what happened."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from typing import Any

import pytest

from tierd.core.machine import TierMachine
from tierd.core.model import Evict, Grant, Read
from tierd.sim.recording import Recording
from tierd.sim.scenario import cycle, drawn
from tierd.sim.simulation import Simulation
from tierd_tools.trace_tracks import CLIENTS, SSD, TIER, Decided, tracks

KNOWN = {"M", "X", "b", "e", "i", "C", "s", "f"}


def traced(simulation: Simulation) -> tuple[Recording, list[dict[str, Any]]]:
    machine = simulation.machine
    decided = [
        Decided(d.at_ns, d.what, None if d.key is None else (d.key.model, d.key.layer), d.text)
        for d in machine.story()
    ]
    recording = Recording.of(machine)
    memory = machine.snapshot().memory
    end = {"resident_bytes": memory.resident_bytes, "leased_bytes": memory.leased_bytes}
    layers = {0: ("m", [f"model.layers.{number}" for number in range(99)])}
    return recording, tracks(recording, decided, layers, {0: "chat"}, end)


def simulated(scenario: Any, story_length: int = 1_000_000) -> Simulation:
    simulation = Simulation(scenario, check=False)
    config = dataclasses.replace(simulation.machine.config, story_length=story_length)
    simulation.machine = TierMachine(config)
    simulation.run()
    return simulation


def check_format(events: list[dict[str, Any]]) -> None:
    """The rules of the Trace Event Format that a viewer relies on."""
    assert json.loads(json.dumps(events, allow_nan=False)) == events
    timed = [event for event in events if event["ph"] != "M"]
    assert events[: len(events) - len(timed)] == [e for e in events if e["ph"] == "M"]
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    processes = {event["pid"] for event in events if event["name"] == "process_name"}
    open_ids: dict[tuple[str, int], int] = defaultdict(int)
    over_us: dict[tuple[int, int], float] = defaultdict(float)
    flows: dict[int, str] = {}
    for event in timed:
        assert event["ph"] in KNOWN
        assert event["ts"] >= 0
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        assert event["pid"] in processes
        where = (event["pid"], event["tid"])
        assert where in named or event["ph"] == "C"
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0
                assert event["ts"] >= over_us[where] - 0.002  # slices of a line do not overlap
                over_us[where] = event["ts"] + event["dur"]
            case "b":
                open_ids[event["cat"], event["id"]] += 1
                assert open_ids[event["cat"], event["id"]] == 1
            case "e":
                open_ids[event["cat"], event["id"]] -= 1
                assert open_ids[event["cat"], event["id"]] == 0
            case "s" | "f":
                assert flows.get(event["id"], "-") == {"s": "-", "f": "s"}[event["ph"]]
                flows[event["id"]] = event["ph"]
            case "C":
                assert all(type(value) in (int, float) for value in event["args"].values())
                assert all(value >= 0 for value in event["args"].values())
            case "i":
                assert event["s"] == "t"
    assert not any(open_ids.values())
    assert set(flows.values()) <= {"f"}


@pytest.mark.parametrize("seed", range(12))
def test_every_trace_keeps_the_rules_of_the_format(seed: int) -> None:
    _, events = traced(simulated(drawn(seed, steps=12)))
    check_format(events)


@pytest.mark.parametrize("seed", [0, 2, 3, 4, 5, 6])
def test_so_does_one_that_begins_in_the_middle(seed: int) -> None:
    simulation = simulated(drawn(seed, clients=4, steps=30), story_length=150)
    recording, events = traced(simulation)
    assert simulation.machine.record.extent.first > 0
    assert recording.moments
    check_format(events)


def test_every_read_compute_and_eviction_is_there() -> None:
    recording, events = traced(simulated(cycle(24, 12, steps=72)))
    actions = [action for moment in recording.moments for action in moment.actions]
    slices = [event for event in events if event["ph"] == "X"]
    reads = [event for event in slices if event["pid"] == SSD]
    assert len(reads) == sum(isinstance(action, Read) for action in actions)
    assert {read["args"]["reason"] for read in reads} == {"ahead"}
    assert all(read["args"]["bytes"] == 2 << 20 for read in reads)
    computes = [e for e in slices if e["pid"] == CLIENTS and e["cat"] == "compute"]
    assert len(computes) == sum(isinstance(action, Grant) for action in actions)
    assert computes[0]["name"] == "m model.layers.0"
    evicted = [event for event in events if event["ph"] == "i" and event["cat"] == "evict"]
    assert len(evicted) == sum(isinstance(action, Evict) for action in actions)
    assert all(event["args"]["reason"] for event in evicted)
    assert [e["args"]["name"] for e in events if e["name"] == "thread_name"][
        -1
    ] == "client 0 (chat)"


def test_a_flow_leads_from_a_read_to_the_first_use_of_what_it_read() -> None:
    _, events = traced(simulated(cycle(24, 12, steps=48)))
    begins = {event["id"]: event for event in events if event["ph"] == "s"}
    ends = {event["id"]: event for event in events if event["ph"] == "f"}
    assert begins.keys() == ends.keys()
    reads = {(e["tid"], e["ts"]): e["name"] for e in events if e["ph"] == "X" and e["pid"] == SSD}
    uses = {e["ts"]: e["name"] for e in events if e["ph"] == "X" and e["pid"] == CLIENTS
            and e["cat"] == "compute"}  # fmt: skip
    for number, begin in begins.items():
        assert reads[begin["tid"], begin["ts"]] == uses[ends[number]["ts"]]
        assert begin["ts"] <= ends[number]["ts"]


def test_counters_follow_what_is_in_memory() -> None:
    recording, events = traced(simulated(cycle(24, 12, steps=48)))
    counts: dict[str, list[int]] = defaultdict(list)
    for event in events:
        if event["ph"] == "C":
            counts[event["name"]].append(event["args"]["bytes"])
    assert max(counts["resident"]) <= recording.config.budget_bytes
    assert max(counts["resident"]) > recording.config.budget_bytes // 2
    assert 2 << 20 <= max(counts["leased"]) <= 3 * (2 << 20)
    assert counts["leased"][-1] == counts["resident"][-1] == 0  # all clients and models are gone
    assert max(counts["bytes per second"]) == pytest.approx(2e9, rel=0.1)
    assert counts["bytes per second"][-1] == 0


def test_counters_of_a_ring_that_begins_in_the_middle_are_led_back_from_the_end() -> None:
    whole, part = (simulated(cycle(24, 12, steps=240), length) for length in (10**6, 1_500))
    assert part.machine.record.extent.first > 0
    series = []
    for simulation in (whole, part):
        recording, events = traced(simulation)
        begin_us = recording.begin_ns / 1000
        series.append({
            round(event["ts"] + begin_us, 1): event["args"]["bytes"]
            for event in events if event["ph"] == "C" and event["name"] == "resident"
        })  # fmt: skip
    later = sorted(series[1])[1:]
    assert [series[1][at] for at in later] == [series[0][at] for at in later]
    assert max(series[1].values()) > 10 * (2 << 20)
    assert TIER == 1
