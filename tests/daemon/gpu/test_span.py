from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierd.gpu.span import Spans, chunks_of


@given(st.integers(0, 1000), st.integers(1, 1000), st.integers(1, 64))
def test_the_chunks_of_a_range_are_those_that_it_touches(
    offset: int, nbytes: int, chunk_bytes: int
) -> None:
    first, count = chunks_of(offset, nbytes, chunk_bytes)
    touched = {byte // chunk_bytes for byte in range(offset, offset + nbytes)}
    assert set(range(first, first + count)) == touched


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 2), (0, 0), (5, -1)])
def test_what_is_no_range_has_no_chunks(offset: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="is no range of an arena"):
        chunks_of(offset, nbytes, 16)


def test_leftovers_count_as_memory_of_the_device_but_not_of_the_chunk() -> None:
    spans: Spans[str] = Spans(16)
    spans.add(3, 1000, 64)
    spans[3].chunks[0] = "memory"
    spans[3].leftovers[2] = "stuck"
    assert spans.backed_bytes == 32
    assert spans[3].missing(0, 4) == [1, 2, 3]
    assert spans[3].left_over(0, 4) == [2]
    assert spans[3].address(2) == 1032
    assert spans[3].target(5, 11) == 1005
    with pytest.raises(ValueError, match=r"\[5, 17\) of arena 3: chunk 1 has no memory"):
        spans[3].target(5, 12)
