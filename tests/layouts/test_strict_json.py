"""The JSON of indices and shard headers."""

from __future__ import annotations

import pytest

from tierd_layouts import strict_json


def test_ordinary_json_is_read() -> None:
    assert strict_json.parse(b'{"a": [1, -2, null, true, "x"], "b": {}}') == {
        "a": [1, -2, None, True, "x"],
        "b": {},
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": 1, "b": 2, "a": 3}', "member 'a' appears twice"),
        (b'{"x": {"n": 1, "n": 1}}', "member 'n' appears twice"),
        (b"[1.5]", "number 1.5 is not an integer"),
        (b"[NaN]", "number NaN is not an integer"),
        (b"[-Infinity]", "number -Infinity is not an integer"),
        (b"\xff", "utf-8"),
        (b"{", "Expecting"),
    ],
)
def test_what_the_formats_do_not_allow_is_named(text: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        strict_json.parse(text)


def test_a_late_duplicate_among_many_members_is_found() -> None:
    members = ", ".join(f'"m{number}": 0' for number in range(100_000))
    with pytest.raises(ValueError, match="'m99999' appears twice"):
        strict_json.parse(f'{{{members}, "m99999": 0}}'.encode())
