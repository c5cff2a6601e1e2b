"""The bound is exact for equal layers, below every cache of whole layers otherwise."""

from __future__ import annotations

import functools
import itertools
import random

import pytest

from tierd.sim.reference import min_with_bypass, next_uses


def fewest_bytes(
    references: list[int], nbytes: dict[int, int], capacity: int, *, in_use_counts: bool = False
) -> int:
    """Every choice of whole layers to keep after every reference, tried out."""

    @functools.cache
    def from_here(index: int, kept: frozenset[int]) -> int:
        if index == len(references):
            return 0
        key = references[index]
        read = 0 if key in kept else nbytes[key]
        others = kept - {key}
        best = None
        for count in range(len(others) + 1):
            for stay in itertools.combinations(sorted(others), count):
                held = sum(nbytes[layer] for layer in stay)
                if in_use_counts and held + nbytes[key] > capacity:
                    continue
                for after in ({*stay}, {*stay, key}):
                    if sum(nbytes[layer] for layer in after) <= capacity:
                        cost = from_here(index + 1, frozenset(after))
                        best = cost if best is None else min(best, cost)
        assert best is not None
        return read + best

    return from_here(0, frozenset())


@pytest.mark.parametrize("in_use_counts", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_for_equal_layers_it_is_the_minimum_over_all_choices(
    seed: int, in_use_counts: bool
) -> None:
    rng = random.Random(seed)
    layers = rng.randint(2, 5)
    references = [rng.randrange(layers) for _ in range(rng.randint(1, 11))]
    nbytes = dict.fromkeys(range(layers), 4096)
    capacity = 4096 * rng.randint(1, 3)
    found = min_with_bypass(references, nbytes, capacity, in_use_counts=in_use_counts)
    best = fewest_bytes(references, nbytes, capacity, in_use_counts=in_use_counts)
    assert found.read_bytes == best
    assert found.read_bytes == 4096 * (len(references) - found.hits)


@pytest.mark.parametrize("in_use_counts", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_for_layers_of_different_sizes_no_cache_of_whole_layers_reads_less(
    seed: int, in_use_counts: bool
) -> None:
    rng = random.Random(seed)
    layers = rng.randint(2, 5)
    references = [rng.randrange(layers) for _ in range(rng.randint(1, 10))]
    nbytes = {layer: rng.randint(1, 7) for layer in range(layers)}
    capacity = rng.randint(max(nbytes.values()), 14)
    found = min_with_bypass(references, nbytes, capacity, in_use_counts=in_use_counts)
    assert found.read_bytes <= fewest_bytes(
        references, nbytes, capacity, in_use_counts=in_use_counts
    )


@pytest.mark.parametrize("in_use_counts", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_for_layers_of_different_sizes_it_is_the_minimum_over_their_bytes(
    seed: int, in_use_counts: bool
) -> None:
    """Each byte as a layer of its own, the bytes of a layer one after the other."""
    rng = random.Random(seed)
    layers = rng.randint(2, 3)
    order = [rng.randrange(layers) for _ in range(rng.randint(1, 6))]
    nbytes = {layer: rng.randint(1, 2) for layer in range(layers)}
    capacity = rng.randint(max(nbytes.values()), 4)
    found = min_with_bypass(order, nbytes, capacity, in_use_counts=in_use_counts)
    assert found.read_bytes == fewest_byte_reads(order, nbytes, capacity, in_use_counts)


def fewest_byte_reads(
    order: list[int], nbytes: dict[int, int], capacity: int, in_use_counts: bool
) -> int:
    """As `fewest_bytes`, keeping any number of bytes of each layer."""
    layers = sorted(nbytes)

    @functools.cache
    def from_here(index: int, kept: tuple[int, ...]) -> int:
        if index == len(order):
            return 0
        now = order[index]
        best = None
        choices = [
            range(nbytes[layer] + 1) if layer == now else range(kept[layer] + 1) for layer in layers
        ]
        for after in itertools.product(*choices):
            others = sum(after) - after[now]
            if sum(after) > capacity or (in_use_counts and others + nbytes[now] > capacity):
                continue
            cost = from_here(index + 1, after)
            best = cost if best is None else min(best, cost)
        assert best is not None
        return nbytes[now] - kept[now] + best

    return from_here(0, (0,) * len(layers))


def test_on_a_cycle_the_capacity_is_hit_in_every_pass() -> None:
    passes, layers, capacity = 50, 24, 12
    found = min_with_bypass(list(range(layers)) * passes, dict.fromkeys(range(layers), 1), capacity)
    assert found.hits == capacity * (passes - 1)
    assert found.asked_bytes == passes * layers


def test_the_layer_in_use_takes_one_place_when_it_counts() -> None:
    passes, layers, capacity = 200, 24, 12
    nbytes = dict.fromkeys(range(layers), 1)
    found = min_with_bypass(list(range(layers)) * passes, nbytes, capacity, in_use_counts=True)
    ratio = (capacity - 1) / (layers - 1)
    assert found.hit_ratio == pytest.approx(ratio, abs=0.01)


def test_a_layer_that_is_larger_than_the_memory_only_passes_by() -> None:
    assert min_with_bypass(["a", "a"], {"a": 5}, 4).read_bytes == 6
    with pytest.raises(ValueError, match=r"a needs 5 bytes, the memory has 4"):
        min_with_bypass(["a"], {"a": 5}, 4, in_use_counts=True)


def test_without_references_nothing_is_read() -> None:
    found = min_with_bypass([], {}, 10)
    assert (found.references, found.read_bytes, found.hit_ratio) == (0, 0, 0.0)


def test_the_next_use_of_the_last_reference_is_the_end() -> None:
    assert next_uses(["a", "b", "a", "a"]) == [2, 4, 3, 4]
