"""Fields of a request, checked: whoever sent it may have sent anything. All raise BadRequest."""

from __future__ import annotations

from typing import Any

from tierd.errors import BadRequest

MAX_LEASE = (1 << 63) - 1  #: number of a lease


def text(message: dict[str, Any], field: str) -> str:
    value = message.get(field)
    if type(value) is not str:
        raise BadRequest(f"{message['op']}: {field} is {value!r:.40}, expected a text")
    return value


def number(
    message: dict[str, Any], field: str, low: int, high: int, default: int | None = None
) -> int:
    value = message.get(field, default)
    if type(value) is not int or not low <= value <= high:
        raise BadRequest(
            f"{message['op']}: {field} is {value!r:.40}, expected a number from {low} to {high}"
        )
    return value


def numbers(value: object, field: str, low: int, high: int) -> list[int]:
    if not isinstance(value, list) or not all(
        type(item) is int and low <= item <= high for item in value
    ):
        raise BadRequest(f"{field}: expected a list of numbers from {low} to {high}")
    return value
