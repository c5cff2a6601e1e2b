"""What a GPU's settings become."""

from __future__ import annotations

import pytest

from tierd.gpu_settings import chunk_bytes

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize(
    ("budget", "chunk"),
    [
        (2 * MIB, 2 * MIB),
        (GIB, 2 * MIB),
        (4 * GIB, 4 * MIB),
        (4 * GIB - 1, 2 * MIB),
        (20 * GIB, 16 * MIB),
        (64 * GIB, 64 * MIB),
        (140 * GIB, 64 * MIB),
    ],
)
def test_a_chunk_that_nobody_chose_is_a_1024th_of_the_budget(budget: int, chunk: int) -> None:
    assert chunk_bytes(None, budget) == chunk


def test_a_chunk_that_was_chosen_is_taken() -> None:
    assert chunk_bytes(GIB, 140 * GIB) == GIB
