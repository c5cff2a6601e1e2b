"""Lanes see each other's registers as the PTX manual says."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.gpu.ptx.errors import Undefined, UnknownPtx
from tests.kernels.gpu.ptx.snippets import computed

LANES = np.arange(64, dtype=np.uint32)


def shuffled(how: str, by: int, clamp: int) -> list[int]:
    """In plain Python, for two warps."""
    found = []
    for thread in range(64):
        lane, segment, last = thread % 32, clamp >> 8 & 31, clamp & 31
        least = lane & segment
        most = least | last & ~segment & 31
        other = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": least | by & ~segment & 31,
        }[how]
        inside = other >= most if how == "up" else other <= most
        found.append(thread - lane + (other if inside else lane))
    return found


@pytest.mark.parametrize(
    ("how", "clamps"),
    [("up", (0, 0x1800)), ("down", (31, 0x1807)), ("bfly", (31, 0x1C03)), ("idx", (31, 0x1807))],
)
def test_a_shuffle_takes_the_lane_of_the_manual(how: str, clamps: tuple[int, int]) -> None:
    for clamp in clamps:
        for by in (0, 1, 3, 16, 31):
            line = f"shfl.sync.{how}.b32 %r9, %r0, {by}, {clamp}, -1;"
            found = computed(line, [LANES], "%r9")
            assert found.tolist() == shuffled(how, by, clamp), (by, clamp)


def test_a_shuffle_says_which_lanes_were_inside() -> None:
    found = computed("shfl.sync.up.b32 %r9|%p1, %r0, 4, 0, -1;", [LANES], "%p1")
    np.testing.assert_array_equal(found, LANES % 32 >= 4)


def test_a_reduction_is_of_each_warp_and_signed_if_it_says_so() -> None:
    numbers = LANES - np.uint32(40)
    for how, wanted in (("min.s32", [-40, -8]), ("max.u32", [-9 & 0xFFFFFFFF, 0xFFFFFFFF])):
        found = computed(f"redux.sync.{how} %r9, %r0, -1;", [numbers], "%r9")
        np.testing.assert_array_equal(found, np.array(wanted).astype(np.uint32).repeat(32))


def test_a_ballot_has_a_bit_for_each_lane() -> None:
    line = "setp.gt.u32 %p1, %r0, 33; vote.sync.ballot.b32 %r9, %p1, -1;"
    found = computed(line, [LANES], "%r9")
    assert found.tolist() == [0] * 32 + [0xFFFFFFFC] * 32
    any_of = computed("setp.eq.u32 %p1, %r0, 33; vote.sync.any.pred %p2, %p1, -1;", [LANES], "%p2")
    assert any_of.tolist() == [0] * 32 + [1] * 32


def test_a_shuffle_that_not_all_lanes_reach_is_an_error() -> None:
    line = """setp.gt.u32 %p1, %r0, 3; mov.b32 %r9, 0; @%p1 bra DONE;
        shfl.sync.idx.b32 %r9, %r0, 0, 31, -1; DONE:"""
    with pytest.raises(Undefined, match="only 4 threads are here"):
        computed(line, [LANES], "%r9")


def test_a_part_of_a_warp_is_not_known() -> None:
    with pytest.raises(UnknownPtx, match="a part of a warp"):
        computed("shfl.sync.idx.b32 %r9, %r0, 0, 31, 15;", [LANES], "%r9")
