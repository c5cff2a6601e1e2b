"""Who has which chunk, and what waits for whom."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tierd.mappings import Discarding, Mappings


def test_chunks_that_nobody_has_go_at_once() -> None:
    mappings = Mappings()
    mappings.give(1, 5, [3])
    assert mappings.discard(Discarding(5, 4, 2, since_ns=0))
    assert mappings.discard(Discarding(6, 3, 1, since_ns=0))
    assert mappings.wanted_of(1) == {}


def test_a_discard_waits_for_every_client_that_has_one_of_its_chunks() -> None:
    mappings = Mappings()
    mappings.give(1, 5, [3, 4])
    mappings.give(2, 5, [4, 9])
    discarding = Discarding(5, 2, 4, since_ns=0)
    assert not mappings.discard(discarding)
    assert mappings.wanted_of(1) == {5: [3, 4]}
    assert mappings.wanted_of(2) == {5: [4]}
    assert mappings.wanted_of(3) == {}
    assert mappings.take(1, [(5, 3), (5, 4)]) == []
    assert mappings.wanted_of(1) == {}
    assert mappings.take(2, [(5, 4)]) == [discarding]
    assert mappings.discard(discarding)


def test_a_client_that_is_gone_holds_nothing_up() -> None:
    mappings = Mappings()
    mappings.give(1, 5, [3])
    discarding = Discarding(5, 3, 1, since_ns=0)
    assert not mappings.discard(discarding)
    assert mappings.gone(2) == []
    assert mappings.gone(1) == [discarding]
    assert mappings.gone(1) == []


def test_what_a_client_unmaps_without_having_it_changes_nothing() -> None:
    mappings = Mappings()
    mappings.give(1, 5, [3])
    assert not mappings.discard(Discarding(5, 3, 1, since_ns=0))
    assert mappings.take(2, [(5, 3)]) == []
    assert mappings.take(1, [(6, 3), (5, 99)]) == []
    assert mappings.wanted_of(1) == {5: [3]}


def test_a_chunk_that_is_asked_for_again_is_held_again() -> None:
    mappings = Mappings()
    mappings.give(1, 5, [3])
    mappings.take(1, [(5, 3)])
    mappings.give(1, 5, [3])
    assert not mappings.discard(Discarding(5, 3, 1, since_ns=0))


def test_the_late_are_those_that_still_have_something_that_was_asked_back_long_ago() -> None:
    mappings = Mappings()
    mappings.give(1, 5, [3])
    mappings.give(2, 5, [3, 8])
    mappings.discard(Discarding(5, 3, 1, since_ns=10))
    mappings.discard(Discarding(5, 8, 1, since_ns=20))
    assert mappings.late(10) == set()
    assert mappings.late(11) == {1, 2}
    mappings.take(2, [(5, 3)])
    assert mappings.late(11) == {1}
    assert mappings.late(21) == {1, 2}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["give", "take", "gone", "discard"]),
        st.integers(1, 3),
        st.integers(0, 7),
        st.integers(1, 3),
    ),
    max_size=60,
)


@given(STEPS)
def test_a_discard_is_over_exactly_when_nobody_has_its_chunks(
    steps: list[tuple[str, int, int, int]],
) -> None:
    mappings = Mappings()
    have: set[tuple[int, int]] = set()  # client, chunk
    waiting: list[Discarding] = []

    def mapped(discarding: Discarding) -> bool:
        wanted = range(discarding.first, discarding.first + discarding.count)
        return any(chunk in wanted for _, chunk in have)

    for number, (what, client, chunk, count) in enumerate(steps):
        chunks = list(range(chunk, chunk + count))
        ended: list[Discarding] = []
        if what == "give":
            busy = [c for d in waiting for c in range(d.first, d.first + d.count)]
            chunks = [c for c in chunks if c not in busy]  # a chunk that goes has no lease
            mappings.give(client, 0, chunks)
            have |= {(client, c) for c in chunks}
        elif what == "take":
            have -= {(client, c) for c in chunks}
            ended = mappings.take(client, [(0, c) for c in chunks])
        elif what == "gone":
            have = {(c, at) for c, at in have if c != client}
            ended = mappings.gone(client)
        else:
            discarding = Discarding(0, chunk, count, number)
            waits = mapped(discarding)
            assert mappings.discard(discarding) is not waits
            waiting += [discarding] if waits else []
        assert ended == [d for d in waiting if not mapped(d)]
        waiting = [d for d in waiting if d not in ended]
        for client in range(1, 4):
            wanted = {c for d in waiting for c in range(d.first, d.first + d.count)}
            asked = mappings.wanted_of(client).get(0, [])
            assert set(asked) == {c for who, c in have if who == client and c in wanted}
