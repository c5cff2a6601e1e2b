"""How far from the end of `values` a record has to begin for windows to be read without asking."""

from __future__ import annotations

from tierd_kernels.gpu.records import far_units

LONGEST = 3 * 4096 + 8 * 512 + 4 * 4096
"""Bytes of a record of F32: 4096 elements, three planes of bytes, 8 of bits, all escapes."""
WINDOWS = 8 * 512 + 12
"""Bytes after a record: planes that are not there, and the words of a last window."""


def test_the_longest_record_and_what_windows_read_behind_it_lie_before_the_end() -> None:
    for values_bytes in (1 << 17, (1 << 17) + 16, 1 << 36):
        last = far_units(values_bytes) - 1
        assert last * 16 + LONGEST + WINDOWS <= values_bytes


def test_most_of_a_large_array_is_far_from_its_end_and_nothing_of_a_small_one() -> None:
    assert far_units(1 << 20) * 16 > (1 << 20) * 0.95
    assert far_units(1 << 15) == 0
    assert far_units(0) == 0
