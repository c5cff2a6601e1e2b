"""Memory in the background: never more than counted, never against a discard or a cgroup."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, cast

import pytest

from tierd import arenas as module
from tierd.access import AccessGroup
from tierd.arenas import RESERVE_BYTES, STEP_BYTES, Arenas
from tierd.errors import ArenaError
from tierd.gpu.errors import DeviceError
from tierd.io.memory_limits import Limit
from tierd.io.pages import PageKind, Pages

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tierd.gpu.errors import GpuError
    from tierd.io.arena import Arena

MIB = 1 << 20
EVERYBODY = AccessGroup(0, 0, 0o444)


@pytest.fixture
async def arenas() -> AsyncIterator[Arenas]:
    arenas = Arenas(64 * MIB, Pages(PageKind.SMALL, "small"), mlock=False, populate=True)
    yield arenas
    await arenas.close()


async def settled(arenas: Arenas) -> None:
    for _ in range(1000):
        if arenas._population is None:
            return
        await asyncio.sleep(0.01)
    pytest.fail("the population does not end")


async def test_a_range_is_populated_in_the_background(arenas: Arenas) -> None:
    arena = arenas.create(EVERYBODY)
    arenas.populate(arena.arena_id, 0, 20 * MIB)
    assert arenas.populated_bytes < 20 * MIB
    await settled(arenas)
    assert arenas.populated_bytes == 20 * MIB


async def test_what_is_discarded_is_not_populated_afterwards(arenas: Arenas) -> None:
    arena = arenas.create(EVERYBODY)
    arenas.populate(arena.arena_id, 0, 3 * STEP_BYTES)
    await asyncio.sleep(0)
    done = asyncio.Event()
    # Across the first step, which may be under way, and the second, which is not.
    arenas.discard(arena.arena_id, STEP_BYTES // 2, STEP_BYTES, done.set)
    await done.wait()
    await settled(arenas)
    assert arenas.populated_bytes == 2 * STEP_BYTES


async def test_population_waits_while_a_limit_is_near_and_says_so(
    arenas: Arenas, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = STEP_BYTES + RESERVE_BYTES - 1
    monkeypatch.setattr(module, "available_bytes", lambda: Limit(left, "memory cgroup /x"))
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    arena = arenas.create(EVERYBODY)
    arenas.populate(arena.arena_id, 0, MIB)
    await asyncio.sleep(0.1)
    assert arenas.populated_bytes == 0
    assert any("memory cgroup /x" in note for note in arenas.notes())
    monkeypatch.setattr(module, "available_bytes", lambda: Limit(left + 1, "memory cgroup /x"))
    await settled(arenas)
    assert arenas.populated_bytes == MIB
    assert not any("memory cgroup /x" in note for note in arenas.notes())


async def test_a_system_without_memory_ends_the_population_with_a_note(
    arenas: Arenas, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = arenas.create(EVERYBODY)

    def refuse(self: Arena, offset: int, nbytes: int) -> None:
        raise ArenaError("no memory here")

    monkeypatch.setattr(type(arena), "populate_step", refuse)
    arenas.populate(arena.arena_id, 0, MIB)
    await settled(arenas)
    assert any("no memory here" in note for note in arenas.notes())


async def test_all_memory_but_the_kept_ranges_is_given_back(arenas: Arenas) -> None:
    arena = arenas.create(EVERYBODY)
    other = arenas.create(AccessGroup(1, 1, 0o400))
    for each in (arena, other):
        with each.buffer(0, 8 * MIB) as memory:
            memory[:] = b"x" * (8 * MIB)
    await arenas.discard_all_but({arena.arena_id: [(4 * MIB, 6 * MIB), (MIB, 2 * MIB)]})
    assert arena.populated_bytes == 3 * MIB
    assert other.populated_bytes == 0
    with arena.buffer(0, 8 * MIB) as memory:
        for mib, byte in enumerate(b"\0x\0\0xx\0\0"):
            assert memory[mib * MIB] == memory[(mib + 1) * MIB - 1] == byte


async def test_each_group_of_readers_has_an_arena_of_its_own(arenas: Arenas) -> None:
    first = arenas.create(EVERYBODY)
    second = arenas.create(AccessGroup(0, 0, 0o400))
    assert first.arena_id != second.arena_id
    assert arenas.by_group[EVERYBODY] is first
    assert first.span_bytes >= 8 * 64 * MIB


class Registrar:
    """What GPUs hear of DRAM: all memory that exists, and discards that wait for them."""

    def __init__(self) -> None:
        self.arenas: dict[int, tuple[int, int]] = {}
        self.exists: set[tuple[int, int]] = set()  # arena, number of a MiB
        self.discards: list[tuple[tuple[int, int, int], Callable[[GpuError | None], None]]] = []

    def add_arena(self, arena: int, address: int, span_bytes: int) -> None:
        self.arenas[arena] = (address, span_bytes)

    def populated(self, arena: int, start: int, end: int) -> None:
        self.exists |= {(arena, mib) for mib in range(start // MIB, end // MIB)}

    def discard(
        self, arena: int, start: int, end: int, done: Callable[[GpuError | None], None]
    ) -> None:
        self.discards.append(((arena, start, end), done))


@pytest.fixture
async def watched() -> AsyncIterator[tuple[Arenas, Registrar]]:
    registrar = Registrar()
    arenas = Arenas(
        64 * MIB, Pages(PageKind.SMALL, "small"), mlock=False, populate=True,
        registrar=cast("Any", registrar),
    )  # fmt: skip
    yield arenas, registrar
    await arenas.close()


async def test_gpus_hear_of_every_arena_and_of_all_memory_that_exists(
    watched: tuple[Arenas, Registrar],
) -> None:
    arenas, registrar = watched
    arena = arenas.create(EVERYBODY)
    assert registrar.arenas == {arena.arena_id: (arena.address, arena.span_bytes)}
    arenas.populate(arena.arena_id, 0, 20 * MIB)
    await settled(arenas)
    assert registrar.exists == {(arena.arena_id, mib) for mib in range(20)}
    arenas.exists(arena.arena_id, 64 * MIB, 2 * MIB)
    assert registrar.exists >= {(arena.arena_id, 64), (arena.arena_id, 65)}


async def test_memory_is_given_back_only_when_no_gpu_reads_it_any_more(
    watched: tuple[Arenas, Registrar],
) -> None:
    arenas, registrar = watched
    arena = arenas.create(EVERYBODY)
    arenas.populate(arena.arena_id, 0, 4 * MIB)
    await settled(arenas)
    done = asyncio.Event()
    arenas.discard(arena.arena_id, MIB, 2 * MIB, done.set)
    await asyncio.sleep(0.05)
    assert arenas.populated_bytes == 4 * MIB
    ((place, unregistered),) = registrar.discards
    assert place == (arena.arena_id, MIB, 3 * MIB)
    unregistered(None)
    await done.wait()
    assert arenas.populated_bytes == 2 * MIB


async def test_what_is_discarded_while_it_is_populated_is_not_said_to_exist(
    watched: tuple[Arenas, Registrar], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To register memory that is gone would make it again."""
    arenas, registrar = watched
    arena = arenas.create(EVERYBODY)
    arenas.populate(arena.arena_id, 0, 3 * STEP_BYTES)
    under_way = asyncio.Event()
    populate_step = arena.populate_step
    loop = asyncio.get_running_loop()

    def stepping(offset: int, nbytes: int) -> None:
        loop.call_soon_threadsafe(under_way.set)
        time.sleep(0.05)
        populate_step(offset, nbytes)

    monkeypatch.setattr(arena, "populate_step", stepping)
    await under_way.wait()
    done = asyncio.Event()
    arenas.discard(arena.arena_id, STEP_BYTES // 2, STEP_BYTES, done.set)
    registrar.discards[0][1](None)
    await done.wait()
    await settled(arenas)
    step = STEP_BYTES // MIB
    kept = [*range(step // 2), *range(3 * step // 2, 3 * step)]
    assert registrar.exists == {(arena.arena_id, mib) for mib in kept}
    assert arenas.populated_bytes == 2 * STEP_BYTES


async def test_memory_that_a_gpu_might_still_read_is_never_given_back(
    watched: tuple[Arenas, Registrar],
) -> None:
    arenas, registrar = watched
    arena = arenas.create(EVERYBODY)
    arenas.populate(arena.arena_id, 0, MIB)
    await settled(arenas)
    arenas.discard(arena.arena_id, 0, MIB, lambda: pytest.fail("it was given back"))
    with pytest.raises(DeviceError, match="the driver refused"):
        registrar.discards[0][1](DeviceError("the driver refused"))
    await asyncio.sleep(0.05)
    assert arenas.populated_bytes == MIB
