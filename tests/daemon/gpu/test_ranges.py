from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tierd.gpu.ranges import Ranges, added, removed, total

RANGE = st.tuples(st.integers(0, 40), st.integers(1, 10)).map(lambda pair: (pair[0], sum(pair)))


def test_ranges_that_touch_become_one() -> None:
    assert added([(0, 4), (8, 12)], 4, 8) == [(0, 12)]
    assert added([(0, 4), (8, 12)], 5, 7) == [(0, 4), (5, 7), (8, 12)]
    assert removed([(0, 12)], 4, 8) == [(0, 4), (8, 12)]


@given(st.lists(st.tuples(st.booleans(), RANGE)))
def test_they_hold_what_a_set_of_numbers_holds(steps: list[tuple[bool, tuple[int, int]]]) -> None:
    ranges: Ranges = []
    numbers: set[int] = set()
    for adds, (start, end) in steps:
        if adds:
            ranges = added(ranges, start, end)
            numbers |= set(range(start, end))
        else:
            ranges = removed(ranges, start, end)
            numbers -= set(range(start, end))
        assert {number for first, last in ranges for number in range(first, last)} == numbers
        assert total(ranges) == len(numbers)
        borders = [border for part in ranges for border in part]
        assert borders == sorted(set(borders)), "sorted, none touches another"
