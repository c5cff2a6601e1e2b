"""What does the record of every decision cost an event of the core?

One recorded day of a simulation goes through the core again and again, event by event. Ours is the
core as it is; theirs the same core whose record drops everything it is told, the two taking turns;
the quickest of each counts, for the difference is small.
Both are timed when the ring is full. The difference is what appending, counting and forgetting
cost; the decisions themselves (`tell`) are timed alone, because dropping them would not show.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from tierd.core.machine import TierMachine
from tierd.core.model import CoreConfig, LayerKey, Release
from tierd.core.story import Story
from tierd.sim.clients import Profile
from tierd.sim.recording import Recording
from tierd.sim.scenario import Model, Scenario
from tierd.sim.simulation import Simulation
from tierd_tools.benchmark import Row

if TYPE_CHECKING:
    from tierd.core.model import Action, Event
    from tierd.core.story import Told

LAYER = 2 << 20
BOUND_US = 2.0
RING = 50_000
TELLS = 200_000
ROUNDS = 9


class Deaf(Story):
    """A record that keeps nothing."""

    def keep(self, at_ns: int, event: Event, actions: list[Action], told: list[Told]) -> None:
        pass


def run() -> list[Row]:
    config, events = _day()
    head, tail = events[: len(events) * 2 // 3], events[len(events) * 2 // 3 :]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(ROUNDS):
        for deaf in (True, False):
            machine = TierMachine(config)
            if deaf:
                machine._books.story = Deaf(RING)
            for event in head:
                machine.handle(event)
            begin = time.perf_counter()
            for event in tail:
                machine.handle(event)
            seconds[deaf].append(time.perf_counter() - begin)
            if not deaf and not machine.record.extent.first:
                raise RuntimeError("the ring is not full: the day is too short")
    ours, theirs = (min(seconds[deaf]) / len(tail) for deaf in (False, True))
    entries = list(machine.record.entries())
    tells = sum(len(entry.decisions) for entry in entries) / len(entries)
    append_us, tell_us = _append_us(), _tell_us()
    return [
        Row("record, us an event, in the running core", (ours - theirs) * 1e6 + tells * tell_us,
            BOUND_US, "us", at_most=1.0),
        Row("record, us an event, alone", append_us + tells * tell_us, BOUND_US, "us",
            at_most=1.0),
        Row(f"one decision, us (an event has {tells:.2f})", tell_us, None, "us"),
        Row("events a second, recording or not", 1 / ours, 1 / theirs, "1/s"),
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
