"""What a hint says, checked: no reply would tell that the daemon drops one that is wrong."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tierd_layouts.wire import MAX_HINT_STEPS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def hint_fields(
    layers: Iterable[str | int] | Mapping[str | int, float],
    steps: int,
    number: Callable[[str | int], int],
) -> dict[str, Any]:
    """The fields of the message. layers: with a probability each, else 1. number: of a layer by its
    name or number, raises for one that there is not. Raises ValueError besides."""
    said = layers if isinstance(layers, Mapping) else dict.fromkeys(layers, 1.0)
    # What numpy and torch count in is as good: the message takes plain numbers only.
    chances = {item: float(chance) for item, chance in said.items()}
    steps = operator.index(steps)
    wrong = [chance for chance in chances.values() if not 0 <= chance <= 1]
    if wrong or not 1 <= steps <= MAX_HINT_STEPS:
        what = f"probability {wrong[0]}" if wrong else f"{steps} steps"
        raise ValueError(
            f"a hint needs probabilities of 0 to 1 and 1 to {MAX_HINT_STEPS} steps, not {what}"
        )
    numbers = [number(item) for item in chances]
    if len(set(numbers)) < len(numbers):
        raise ValueError("a hint names a layer twice, by name and by number")
    ppm = [round(chance * 1_000_000) for chance in chances.values()]
    return {"layers": numbers, "ppm": ppm, "steps": steps}
