from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tierd_client.errors import LayerNotFound
from tierd_client.hints import hint_fields
from tierd_layouts.wire import MAX_HINT_STEPS, encode

NAMES = {"zero": 0, "one": 1, "two": 2}


def number(layer: str | int) -> int:
    found = NAMES.get(layer, -1) if isinstance(layer, str) else layer
    if not 0 <= found < len(NAMES):
        raise LayerNotFound(f"no layer {layer!r}", "not_found")
    return int(found)


def test_layers_that_are_only_named_are_certain() -> None:
    assert hint_fields(["two", 0], 3, number) == {
        "layers": [2, 0],
        "ppm": [1_000_000, 1_000_000],
        "steps": 3,
    }


def test_probabilities_go_out_in_millionths_and_as_plain_numbers() -> None:
    said: dict[Any, Any] = {"one": np.float32(0.25), 2: 0}
    fields = hint_fields(said, np.int64(1), number)  # type: ignore[arg-type]
    assert fields == {"layers": [1, 2], "ppm": [250_000, 0], "steps": 1}
    encode({"id": 1, "op": "hint", **fields})


@pytest.mark.parametrize(
    ("said", "steps", "text"),
    [
        ({"one": 1.5}, 1, "not probability 1.5"),
        ({"one": -0.1}, 1, "not probability -0.1"),
        ({"one": float("nan")}, 1, "not probability nan"),
        (["one"], 0, "not 0 steps"),
        (["one"], MAX_HINT_STEPS + 1, f"not {MAX_HINT_STEPS + 1} steps"),
        (["one", 1], 1, "names a layer twice"),
    ],
)
def test_what_no_reply_would_tell_is_refused(said: Any, steps: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        hint_fields(said, steps, number)


def test_a_layer_that_there_is_not_is_refused() -> None:
    for layer in ("three", 3):
        with pytest.raises(LayerNotFound, match="no layer"):
            hint_fields([layer], 1, number)
