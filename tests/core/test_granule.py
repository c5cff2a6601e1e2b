"""Small slots in one granule: holes are found, taken and joined again."""

from __future__ import annotations

import random

from tierd.core.granule import SMALL_ALIGNMENT as PAGE
from tierd.core.granule import SharedGranule


def test_the_first_hole_that_is_large_enough_is_taken() -> None:
    granule = SharedGranule(8 * PAGE, warm=True)
    for begin in (0, 2, 5):
        granule.take(begin * PAGE, PAGE)
    assert [granule.hole(pages * PAGE) for pages in (1, 2, 3)] == [PAGE, 3 * PAGE, None]


def test_a_slot_takes_whole_pages() -> None:
    granule = SharedGranule(2 * PAGE, warm=True)
    granule.take(0, PAGE + 1)
    assert granule.hole(1) is None
    granule.give_back(0, PAGE + 1)
    assert granule.hole(2 * PAGE) == 0


def test_whatever_comes_and_goes_in_whichever_order_the_granule_is_whole_at_the_end() -> None:
    rng = random.Random(3)
    granule, taken = SharedGranule(64 * PAGE, warm=True), dict[int, int]()
    for _ in range(2_000):
        nbytes = rng.randint(1, 6 * PAGE)
        begin = granule.hole(nbytes)
        if begin is None or (taken and rng.random() < 0.4):
            gone = rng.choice(list(taken))
            granule.give_back(gone, taken.pop(gone))
        else:
            end = begin + nbytes
            assert all(end <= other or other + size <= begin for other, size in taken.items())
            granule.take(begin, nbytes)
            taken[begin] = nbytes
        assert granule.slots == len(taken)
    for begin, nbytes in taken.items():
        granule.give_back(begin, nbytes)
    assert (granule.slots, granule.hole(64 * PAGE)) == (0, 0)
