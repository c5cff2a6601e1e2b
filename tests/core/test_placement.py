"""Address ranges against a model that is a plain array of granules."""

from __future__ import annotations

import random

import pytest

from tierd.core.errors import InvariantBroken
from tierd.core.memory import Memory
from tierd.core.placement import LONGEST_TRIED, FreeRuns

SPAN = 60


@pytest.mark.parametrize("seed", range(20))
def test_free_runs_equal_an_array_of_granules(seed: int) -> None:
    rng = random.Random(seed)
    runs = FreeRuns(SPAN)
    free: list[bool | None] = [False] * SPAN  # None: occupied, else whether warm
    for _ in range(300):
        start = rng.randrange(SPAN)
        end = rng.randint(start + 1, min(SPAN, start + 9))
        states = free[start:end]
        whole = all(state is not None for state in states)
        assert runs.is_free(start, end) == whole
        if whole:
            taken = runs.take(start, end)
            flat = [warm for first, last, warm in taken for _ in range(first, last)]
            assert flat == states
            free[start:end] = [None] * (end - start)
        elif all(state is None for state in states):
            warm = rng.random() < 0.5
            runs.add(start, end, warm)
            free[start:end] = [warm] * (end - start)
        runs.check()
        assert [w for first, last, w in runs.runs() for _ in range(first, last)] == [
            state for state in free if state is not None
        ]
        size = rng.randint(1, 8)
        windows = [free[at : at + size] for at in range(SPAN - size + 1)]
        colds = [window.count(False) for window in windows if None not in window]
        best = runs.best_window(size)
        assert (best is None) == (not colds)
        if best is not None:
            cold, at = best
            assert cold == free[at : at + size].count(False)
            few = sum(warm for _, _, warm in runs.runs()) <= LONGEST_TRIED
            assert cold == min(colds) if few or not min(colds) else cold > 0


def test_what_is_taken_twice_or_freed_twice_is_noticed() -> None:
    runs = FreeRuns(10)
    runs.take(2, 4)
    with pytest.raises(InvariantBroken, match="taken but not free"):
        runs.take(3, 5)
    runs = FreeRuns(10)
    with pytest.raises(InvariantBroken, match="freed twice"):
        runs.add(2, 4, True)


def test_a_slot_reuses_the_tightest_warm_range() -> None:
    memory = Memory(20, 4096, 4096)
    memory.add_arena(0, 100, 20)
    claims = [memory.claim(0, 4096 * size) for size in (3, 2, 5, 1, 4)]
    for claim in (claims[0], claims[2]):
        assert claim is not None
        memory.release(claim.place)
    claim = memory.claim(0, 3 * 4096)
    assert claim is not None
    assert (claim.place.offset, claim.promised, claim.discards) == (0, 0, ())


def test_small_slots_fill_the_holes_of_a_shared_granule() -> None:
    granule = 16 * 4096
    memory = Memory(4, granule, granule)
    memory.add_arena(0, 64, 4)
    claims = [memory.claim(0, nbytes) for nbytes in (4096, 8192, 4096)]
    places = [claim.place for claim in claims if claim is not None]
    start = places[0].offset
    assert [place.offset - start for place in places] == [0, 4096, 12288]
    assert memory.occupied == 1
    memory.release(places[1])
    hole = memory.claim(0, 8192)
    assert hole is not None
    assert hole.place.offset - start == 4096
    for place in (places[0], hole.place, places[2]):
        memory.release(place)
    assert memory.occupied == 0
    memory.check([])


def test_memory_that_is_promised_is_never_given_away_twice() -> None:
    memory = Memory(4, 4096, 0)
    memory.add_arena(0, 100, 4)
    slots = [memory.claim(0, 4096) for _ in range(4)]
    for at in (0, 2):
        claim = slots[at]
        assert claim is not None
        memory.release(claim.place)
    wide = memory.claim(0, 2 * 4096)
    assert wide is not None
    assert wide.promised > 0
    assert not memory.can_warm_up(wide)
    assert memory.claim(0, 4096) is None
    for discard in wide.discards:
        memory.discarded(discard)
    assert memory.can_warm_up(wide)
    memory.warm_up(wide)
    assert memory.warm == 4
