"""Which layers of a cycle stay."""

from __future__ import annotations

import pytest

from tierd.core.retention import layers_to_keep, moving_layers

GRANULE = 100


def kept(sizes: list[int], share: int, moving: int = 2) -> list[int]:
    charges = [-(-size // GRANULE) for size in sizes]
    return sorted(layers_to_keep(range(len(sizes)), charges, sizes, GRANULE, share, moving))


def test_everything_stays_if_it_fits() -> None:
    assert kept([300] * 4, share=12) == [0, 1, 2, 3]


def test_room_for_the_passing_layers_is_left() -> None:
    assert len(kept([300] * 10, share=15)) == (15 - 2 * 3) // 3


def test_those_that_stay_are_spread_over_the_cycle() -> None:
    stay = kept([100] * 24, share=14)
    gaps = [b - a for a, b in zip(stay, [*stay[1:], stay[0] + 24], strict=True)]
    assert len(stay) == 12
    assert set(gaps) <= {1, 2, 3}


def test_the_largest_layers_stay() -> None:
    stay = kept([900, *[200] * 10, 900], share=18 + 4 + 4)
    assert {0, 11} <= set(stay)
    assert len(stay) == 4


def test_small_layers_always_stay() -> None:
    assert set(kept([300, 10, 300, 20, 300], share=8)) >= {1, 3}


@pytest.mark.parametrize("share", [0, 1, 3, 5])
def test_nothing_stays_where_there_is_no_room_to_pass(share: int) -> None:
    assert kept([300, 300, 300], share=share) == []


def test_what_stays_never_takes_the_room_of_what_passes() -> None:
    for share in range(4, 60):
        for sizes in ([300, 500, 200, 700, 400] * 3, [600, 600, *[300] * 9], [100] * 30):
            stay = kept(sizes, share)
            passing = [size // GRANULE for i, size in enumerate(sizes) if i not in stay]
            total = sum(sizes[i] // GRANULE for i in stay)
            assert not stay or not passing or total + 2 * max(passing) <= share


def test_at_least_one_layer_is_read_while_one_is_in_use() -> None:
    assert [moving_layers(lookahead) for lookahead in (0, 1, 2, 5)] == [2, 2, 3, 6]
