"""The bandwidth of a GPU's link, from real copies."""

from __future__ import annotations

import pytest

from tierd.core.copy_rate import CopyRate

MS = 1_000_000
GB = 10**9


def test_nothing_is_known_before_the_first_copies_and_these_are_believed() -> None:
    rate = CopyRate()
    assert rate.bytes_per_s is None
    assert rate.observe(GB // 10, 50 * MS) == pytest.approx(2 * GB, rel=1e-6)
    assert rate.bytes_per_s == pytest.approx(2 * GB, rel=1e-6)


def test_one_odd_observation_moves_it_little_and_many_move_it_all_the_way() -> None:
    rate = CopyRate()
    for _ in range(20):
        rate.observe(GB // 10, 50 * MS)
    assert rate.observe(GB // 10, 500 * MS) == pytest.approx(1.5 * GB, rel=0.01)
    for _ in range(40):
        rate.observe(GB // 10, 100 * MS)
    assert rate.bytes_per_s == pytest.approx(GB, rel=0.02)


@pytest.mark.parametrize(("nbytes", "busy_ns"), [(0, 1), (1, 0), (5, -1)])
def test_what_is_no_copy_is_refused(nbytes: int, busy_ns: int) -> None:
    with pytest.raises(ValueError, match="are no copy"):
        CopyRate().observe(nbytes, busy_ns)
