"""What does the record of every decision cost an event of the core?

One recorded day of a simulation goes through the core; when the ring is full, a clock runs around
what the record does with each event: append, count, forget the oldest. What the clock itself costs
is taken off, measured with a record that keeps nothing, the two taking turns. The decisions of an
event (`tell`) are timed alone and added.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import TYPE_CHECKING

from tierd.core.machine import TierMachine
from tierd.core.model import CoreConfig, LayerKey, Release
from tierd.core.story import Story
from tierd.sim.recording import Recording
from tierd.sim.scenario import Model, Scenario
from tierd.sim.simulation import Simulation
from tierd.sim.virtual_client import Profile
from tierd_tools.benchmark import Row

if TYPE_CHECKING:
    from tierd.core.model import Action, Event
    from tierd.core.story import Entry, Told

LAYER = 2 << 20
BOUND_US = 2.0
RING = 50_000
TELLS = 200_000
ROUNDS = 7


class Timed(Story):
    """The record, with a clock around what an event costs it."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.spent_ns = 0

    def keep(self, at_ns: int, event: Event, actions: list[Action], told: list[Told]) -> None:
        begin = time.perf_counter_ns()
        super().keep(at_ns, event, actions, told)
        self.spent_ns += time.perf_counter_ns() - begin


class Deaf(Timed):
    """A record that keeps nothing: what the clock costs."""

    def keep(self, at_ns: int, event: Event, actions: list[Action], told: list[Told]) -> None:
        begin = time.perf_counter_ns()
        self.spent_ns += time.perf_counter_ns() - begin


def run() -> list[Row]:
    config, events = _day()
    head, tail = events[: len(events) * 2 // 3], events[len(events) * 2 // 3 :]
    spent_us: dict[type[Timed], list[float]] = {Timed: [], Deaf: []}
    kept: list[Entry] = []
    for _ in range(ROUNDS):
        for kind, found in spent_us.items():
            machine = TierMachine(config)
            machine._books.story = record = kind(RING)
            for event in head:
                machine.handle(event)
            record.spent_ns = 0
            for event in tail:
                machine.handle(event)
            found.append(record.spent_ns / len(tail) / 1000)
            if kind is Timed:
                kept = list(record.entries())
    if not kept[0].number:
        raise RuntimeError("the ring is not full: the day is too short")
    keep_us = statistics.median(spent_us[Timed]) - statistics.median(spent_us[Deaf])
    tells = sum(len(entry.decisions) for entry in kept) / len(kept)
    tell_us = _tell_us()
    return [
        Row("record, us an event, in the running core", keep_us + tells * tell_us, BOUND_US,
            "us", at_most=1.0),
        Row("record, us an event, alone (in the cache)", _append_us() + tells * tell_us, BOUND_US,
            "us", at_most=1.0),
        Row(f"one decision, us (an event has {tells:.2f})", tell_us, None, "us"),
    ]  # fmt: skip


def _day() -> tuple[CoreConfig, list[Event]]:
    """20 clients over 5 models that fit by half: the events, and the limits they were made for."""
    models = tuple(Model(number, 0, (LAYER,) * 32) for number in range(5))
    clients = tuple(
        Profile(number % 5, tuple(range(32)), steps=700, compute_ns=1_000_000 * (1 + number % 3))
        for number in range(20)
    )
    simulation = Simulation(Scenario(80 * LAYER, models, clients), check=False)
    config = dataclasses.replace(simulation.machine.config, story_length=10_000_000)
    simulation.machine = TierMachine(config)
    simulation.run()
    events = [moment.event for moment in Recording.of(simulation.machine).moments]
    return dataclasses.replace(config, story_length=RING), events


def _append_us() -> float:
    """Of one entry with an action and two decisions, the oldest being forgotten."""
    story = Story(1_000)
    event = Release(1, 2, 3)
    told: list[Told] = [("grant", LayerKey(0, 1), "client {}", 2)] * 2
    actions: list[Action] = []
    begin = time.perf_counter()
    for at_ns in range(TELLS):
        story.keep(at_ns, event, actions, told)
    return (time.perf_counter() - begin) / TELLS * 1e6


def _tell_us() -> float:
    """Of telling one decision with two values."""
    books = TierMachine(CoreConfig(LAYER))._books
    key = LayerKey(0, 1)
    begin = time.perf_counter()
    for number in range(TELLS):
        books.tell("grant", key, "client {} after {} ns", number, 5)
        if not number % 16:
            books.told = []
    return (time.perf_counter() - begin) / TELLS * 1e6
