"""Records that are made quickly are otherwise what frozen dataclasses are."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, field, fields, replace

import pytest

from tierd.core.model import Acquire, Grant, LayerKey, Release
from tierd.core.records import quickly_made


@quickly_made
@dataclass(frozen=True, slots=True, order=True)
class Quick:
    first: int
    second: str = "two"
    third: tuple[int, ...] = field(default_factory=tuple)


def test_it_takes_what_it_took_and_says_what_it_said() -> None:
    assert Quick(1) == Quick(1, "two", ()) == Quick(first=1, second="two")
    assert repr(Quick(1, third=(2,))) == "Quick(first=1, second='two', third=(2,))"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'first'"):
        Quick()  # type: ignore[call-arg]


def test_equal_ones_are_one_key_and_they_have_an_order() -> None:
    assert len({Quick(1), Quick(1), Quick(2)}) == 2
    assert sorted([Quick(2), Quick(1, "b"), Quick(1, "a")])[0].second == "a"


def test_they_are_copied_replaced_and_listed_like_others() -> None:
    made = Quick(1, third=(5,))
    assert replace(made, first=2) == Quick(2, third=(5,))
    assert copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made
    assert [one.name for one in fields(made)] == ["first", "second", "third"]


@pytest.mark.parametrize("record", [LayerKey, Acquire, Release, Grant])
def test_the_records_of_every_request_stay_small_and_frozen_for_the_type_checker(
    record: type,
) -> None:
    assert record.__dataclass_params__.frozen  # type: ignore[attr-defined]
    made = record(*range(len(fields(record))))
    assert not hasattr(made, "__dict__")
