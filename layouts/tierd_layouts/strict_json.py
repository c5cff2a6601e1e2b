"""JSON as the formats allow it: UTF-8, every member once, integers only."""

from __future__ import annotations

import json
from typing import NoReturn

from tierd_layouts.excerpt import excerpt


def parse(text: bytes) -> object:
    """The value. Raises ValueError for what is not JSON in UTF-8, for a member that appears twice
    and for a number that is no integer; RecursionError for one nested too deep."""
    return json.loads(
        text.decode("utf-8"),
        object_pairs_hook=_refuse_duplicates,
        parse_float=_refuse_number,
        parse_constant=_refuse_number,
    )


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"member {excerpt(name)} appears twice")
            seen.add(name)
    return found


def _refuse_number(literal: str) -> NoReturn:
    # Fractions have more than one text, so no canonical form would be unique.
    raise ValueError(f"number {literal[:40]} is not an integer")
