from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tierd_layouts import runs
from tierd_layouts.errors import BadMatrix

if TYPE_CHECKING:
    from tierd_layouts.tile_grid import CountArray


def counts(*values: int) -> CountArray:
    return np.array(values, np.int64)


def test_places_follow_each_run_from_its_start() -> None:
    assert runs.places(counts(10, 0, 5), counts(3, 0, 2)).tolist() == [10, 11, 12, 5, 6]
    assert runs.places(counts(), counts()).tolist() == []


def test_runs_become_rows_of_one_length_and_come_back() -> None:
    items = np.arange(20, dtype=np.uint64)
    rows = runs.take(items, counts(4, 9, 0), counts(2, 0, 3), 4)
    assert rows.tolist() == [[4, 5, 0, 0], [0, 0, 0, 0], [0, 1, 2, 0]]
    again = np.zeros(20, np.uint64)
    runs.put(again, counts(4, 9, 0), counts(2, 0, 3), rows)
    assert again.tolist() == [0, 1, 2, 0, 4, 5, *[0] * 14]


def test_offsets_count_whole_units_of_16_bytes() -> None:
    assert runs.make_offsets(counts(0, 1, 16, 17)).tolist() == [0, 0, 1, 2, 4]
    runs.check_offsets(np.array([0, 0, 1, 2, 4], np.uint32), counts(0, 1, 16, 17), 64)


def test_more_than_the_offsets_can_address_is_refused() -> None:
    most = (2**32 - 1) * 16
    assert runs.make_offsets(counts(most)).tolist() == [0, 2**32 - 1]
    with pytest.raises(BadMatrix, match="68719476736 bytes of values"):
        runs.make_offsets(counts(most, 1))
