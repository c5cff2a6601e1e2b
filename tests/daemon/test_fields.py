"""Fields of a request: whatever a client sent, it is taken or refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from tierd import fields
from tierd.errors import BadRequest

MESSAGE: dict[str, Any] = {"op": "plan", "name": "x", "size": 7, "yes": True, "list": [1, 2]}


def test_what_fits_is_taken() -> None:
    assert fields.text(MESSAGE, "name") == "x"
    assert fields.number(MESSAGE, "size", 7, 7) == 7
    assert fields.number(MESSAGE, "other", 0, 9, default=3) == 3
    assert fields.numbers(MESSAGE["list"], "list", 1, 2) == [1, 2]


@pytest.mark.parametrize("field", ["size", "nothing", "list"])
def test_what_is_no_text_is_refused_by_op_field_and_value(field: str) -> None:
    with pytest.raises(BadRequest, match=f"plan: {field} is .*, expected a text"):
        fields.text(MESSAGE, field)


@pytest.mark.parametrize("field", ["name", "yes", "nothing", "list"])
def test_what_is_no_number_is_refused_and_true_is_none(field: str) -> None:
    with pytest.raises(BadRequest, match=f"plan: {field} is .*, expected a number from 0 to 9"):
        fields.number(MESSAGE, field, 0, 9)


def test_a_number_out_of_its_range_is_refused_with_the_range() -> None:
    for low, high in ((8, 9), (0, 6)):
        with pytest.raises(BadRequest, match=f"size is 7, expected a number from {low} to {high}"):
            fields.number(MESSAGE, "size", low, high)


@pytest.mark.parametrize("value", [None, 3, "12", (1, 2), [1, "2"], [True], [0], [3], [[1]]])
def test_what_is_no_list_of_such_numbers_is_refused(value: object) -> None:
    with pytest.raises(BadRequest, match="list: expected a list of numbers from 1 to 2"):
        fields.numbers(value, "list", 1, 2)
