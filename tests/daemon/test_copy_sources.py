from __future__ import annotations

import pytest

from tierd.copy_sources import CopySources


@pytest.mark.parametrize(
    ("arena", "offset", "nbytes", "waits"),
    [
        (0, 100, 50, True),
        (0, 90, 11, True),
        (0, 149, 1000, True),
        (0, 0, 1000, True),
        (0, 120, 1, True),
        (0, 90, 10, False),
        (0, 150, 10, False),
        (1, 100, 50, False),
    ],
)
def test_memory_that_a_copy_reads_is_given_back_when_that_is_over(
    arena: int, offset: int, nbytes: int, waits: bool
) -> None:
    sources, calls = CopySources(), list[str]()
    source = sources.begin(0, 100, 50)
    sources.when_free(arena, offset, nbytes, lambda: calls.append("free"))
    assert calls == ([] if waits else ["free"])
    sources.end(source)
    assert calls == ["free"]


def test_it_waits_for_every_copy_of_any_part_of_it() -> None:
    sources, calls = CopySources(), list[str]()
    copies = [sources.begin(0, 0, 10), sources.begin(0, 0, 10), sources.begin(0, 90, 10)]
    sources.when_free(0, 0, 100, lambda: calls.append("all"))
    sources.when_free(0, 0, 10, lambda: calls.append("first"))
    sources.end(copies[0])
    assert calls == []
    sources.end(copies[1])
    assert calls == ["first"]
    sources.end(copies[2])
    assert calls == ["first", "all"]
