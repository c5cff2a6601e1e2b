"""Caches that know only the past: what each is known for, and never better than the bound."""

from __future__ import annotations

import random
from collections import OrderedDict

import pytest

from tierd.core.model import (
    Acquire,
    Admit,
    CoreConfig,
    Evict,
    Grant,
    Later,
    LayerKey,
    ModelAdded,
    Plan,
    Read,
    ReadDone,
    Refuse,
    Release,
)
from tierd.sim.reference import min_with_bypass
from tierd.sim.replay_policies import DEMAND_POLICIES, DemandMachine, Use, rank, whole_layers

CYCLE = list(range(24)) * 40
EQUAL = dict.fromkeys(range(24), 1)


def test_on_a_cycle_lru_and_lfu_hit_nothing_and_the_others_nearly_what_fits() -> None:
    ratios = {p: whole_layers(p, CYCLE, EQUAL, 12).hit_ratio for p in DEMAND_POLICIES}
    assert ratios["lru"] == ratios["lfu"] == 0
    assert ratios["mru"] == pytest.approx(11 / 23, abs=0.02)
    assert ratios["pin-first-n"] == pytest.approx(10 / 24, abs=0.02)
    assert whole_layers("furthest", CYCLE, EQUAL, 12).hits == min_with_bypass(CYCLE, EQUAL, 12).hits


@pytest.mark.parametrize("policy", [*DEMAND_POLICIES, "furthest"])
@pytest.mark.parametrize("seed", range(15))
def test_no_cache_reads_less_than_the_bound(policy: str, seed: int) -> None:
    rng = random.Random(seed)
    nbytes = {layer: rng.randint(1, 9) for layer in range(12)}
    references = [int(rng.paretovariate(0.7)) % 12 for _ in range(300)]
    capacity = rng.randint(9, 40)
    bound = min_with_bypass(references, nbytes, capacity)
    found = whole_layers(policy, references, nbytes, capacity)
    assert bound.read_bytes <= found.read_bytes <= found.asked_bytes == bound.asked_bytes


@pytest.mark.parametrize("seed", range(10))
def test_lru_is_lru(seed: int) -> None:
    rng = random.Random(seed)
    references = [rng.randrange(9) for _ in range(200)]
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for key in references:
        hits += key in cache
        cache.pop(key, None)
        cache[key] = None
        if len(cache) > 4:
            cache.popitem(last=False)
    assert whole_layers("lru", references, dict.fromkeys(range(9), 1), 4).hits == hits


def test_lfu_keeps_what_is_used_often() -> None:
    references = [0, 0, 0, 1, 1, 1, *[2, 0, 3, 1] * 5]
    found = whole_layers("lfu", references, dict.fromkeys(range(4), 1), 3)
    assert found.read_bytes == 2 + 10


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match="'belady' is not one of lru"):
        rank("belady", Use())


# --------------------------------------------------------------------------------------- with time


def machine(policy: str = "lru", capacity: int = 2) -> DemandMachine:
    found = DemandMachine(CoreConfig(capacity * 4096), policy)
    found.handle(ModelAdded(0, 0, "m", 0, (4096,) * 6))
    return found


def test_a_demand_is_granted_when_it_was_read_and_says_how_long_it_waited() -> None:
    demand = machine()
    (read,) = demand.handle(Acquire(10, 1, 1, LayerKey(0, 0)))
    assert isinstance(read, Read)
    (grant,) = demand.handle(ReadDone(35, read.slot))
    assert isinstance(grant, Grant)
    assert grant.waited_ns == 25
    (again,) = demand.handle(Acquire(40, 2, 1, LayerKey(0, 0)))
    assert isinstance(again, Grant)
    assert again.waited_ns == 0


def test_what_is_leased_is_not_evicted() -> None:
    demand = machine(capacity=1)
    (read,) = demand.handle(Acquire(0, 1, 1, LayerKey(0, 0)))
    assert isinstance(read, Read)
    (grant,) = demand.handle(ReadDone(1, read.slot))
    assert isinstance(grant, Grant)
    assert demand.handle(Acquire(2, 2, 1, LayerKey(0, 1))) == []
    assert [type(a) for a in demand.handle(Release(3, 1, grant.lease))] == [Evict, Read]


def test_a_request_ahead_starts_a_read_and_holds_no_lease() -> None:
    demand = machine()
    later, read = demand.handle(Acquire(0, 1, 1, LayerKey(0, 3), ahead=True))
    assert isinstance(later, Later)
    assert isinstance(read, Read)
    assert demand.handle(ReadDone(1, read.slot)) == []
    (grant,) = demand.handle(Acquire(2, 1, 2, LayerKey(0, 3)))
    assert isinstance(grant, Grant)


def test_what_does_not_fit_is_refused() -> None:
    demand = DemandMachine(CoreConfig(4096), "lru")
    demand.handle(ModelAdded(0, 0, "m", 0, (4096, 8192)))
    assert isinstance(demand.handle(Plan(0, 1, 1, 0, (0,)))[0], Admit)
    assert isinstance(demand.handle(Plan(0, 1, 2, 0, (0, 1)))[0], Refuse)
    assert isinstance(demand.handle(Acquire(0, 1, 3, LayerKey(0, 1)))[0], Refuse)
