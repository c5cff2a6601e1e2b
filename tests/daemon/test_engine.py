"""The core in its shell: time passes for it, and what it decided holds while it is held back."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import uvloop

from tests.daemon.conftest import write_pack
from tierd.core.model import (
    Acquire,
    ArenaAdded,
    ClientJoined,
    CoreConfig,
    LayerKey,
    ModelAdded,
    ModelRemoved,
    Tick,
)
from tierd.engine import Engine
from tierd.pack import load
from tierd.registry import Registry
from tierd.slots import Slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.daemon.conftest import RawClient, RunningDaemon

LAYER_BYTES = 256 << 10


@pytest.fixture
def slots() -> Iterator[Slots]:
    slots = Slots.create(epoch=1)
    yield slots
    slots.close()


def cpu_seconds(daemon: RunningDaemon) -> float:
    with open(f"/proc/{daemon.pid}/schedstat", "rb") as file:
        return int(file.read().split()[0]) / 1e9


def test_a_plan_that_waits_for_what_others_hold_is_answered_although_nothing_happens(
    start_daemon: Callable[..., RunningDaemon], connect: Callable[..., RawClient], models: Path
) -> None:
    write_pack(models / "tiny", 5, LAYER_BYTES)
    daemon = start_daemon("--models", models, "--dram", str(4 * LAYER_BYTES))
    hoarder, late = connect(daemon).open("tiny"), connect(daemon).open("tiny")
    plan = {"order": [0, 1, 2, 3, 4], "kind": "cyclic", "lookahead": 1}
    hoarder.client.call("plan", model_id=hoarder.model_id, **plan)
    for layer in range(4):
        hoarder.acquire(layer)
    begin = time.monotonic()
    refusal = late.client.refusal("plan", model_id=late.model_id, **plan)
    assert refusal.code == "budget_too_small"
    assert time.monotonic() - begin > 1.5  # it was worth waiting for a while
    # It has its answer: nothing is left to tick for.
    before = cpu_seconds(daemon)
    time.sleep(2.0)
    assert cpu_seconds(daemon) - before < 0.02


async def test_a_read_that_is_held_back_survives_the_removal_of_its_pack(
    slots: Slots, models: Path
) -> None:
    """A reload may come while a warm start still gives memory back."""
    write_pack(models / "tiny", 1, LAYER_BYTES)
    pack = load("tiny", models / "tiny", models)
    registry, started = Registry(), []
    pack.model = 1
    registry.by_model[1] = pack
    arena = SimpleNamespace(buffer=lambda offset, nbytes: memoryview(bytearray(nbytes)))
    engine = Engine(
        CoreConfig(4 * LAYER_BYTES, granule_bytes=4096, small_layer_bytes=4096),
        slots,
        cast("Any", SimpleNamespace(by_id={0: arena})),
        cast("Any", SimpleNamespace(submit=lambda job, done: started.append((job, done)))),
        registry,
        {},
    )
    engine.transfers.hold_reads()
    engine.submit(ArenaAdded(0, 0, 1 << 30))
    engine.submit(ModelAdded(0, 1, "tiny", 0, (LAYER_BYTES,)))
    engine.submit(ClientJoined(0, 1))
    engine.submit(Acquire(0, 1, 1, LayerKey(1, 0)))
    engine.submit(ModelRemoved(1, 1))
    registry.forget(pack)
    engine.transfers.resume_reads()
    assert len(started) == 1
    assert not pack.closed


def test_a_decision_that_is_due_within_the_resolution_of_the_timers_is_awaited(
    slots: Slots,
) -> None:
    engine = Engine(
        CoreConfig(4 * LAYER_BYTES, granule_bytes=4096, small_layer_bytes=4096),
        slots,
        cast("Any", None),
        cast("Any", None),
        Registry(),
        {},
    )
    handled: list[int] = []

    class Machine:
        waits_for_time = True

        @property
        def wakes_at_ns(self) -> int:
            return engine.now() + 200_000

        def handle(self, event: Tick) -> list[Any]:
            handled.append(event.at_ns)
            return []

    engine.core = Machine()

    async def wait() -> None:
        engine.submit(Tick(engine.now()))
        engine.submit(Tick(engine.now()))  # looks at the timer that the first has set
        await asyncio.sleep(0.1)

    uvloop.run(wait())
    engine.stop()
    assert len(handled) > 2
