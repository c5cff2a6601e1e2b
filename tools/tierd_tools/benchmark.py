"""The one form of a benchmark: rows of ours against theirs, a table, and a JSON file.

A benchmark is a module in `tierd_tools.bench` with a docstring that asks one question and a
function `run() -> list[Row]`. Both sides are measured interleaved, in one run; medians count.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison. Exactly one of `at_least` and `at_most` bounds the ratio ours / theirs, or
    neither for a figure that is only printed."""

    row: str
    ours: float | None
    theirs: float | None
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    not_applicable: str | None = None  #: why this machine cannot judge the row
    invert: bool = False  #: the ratio is theirs / ours: for times, where less is better
    binds: str | None = None  #: what keeps the figure where it is, as far as it was measured

    @property
    def ratio(self) -> float | None:
        if self.ours is None or self.theirs is None:
            return None
        return self.theirs / self.ours if self.invert else self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        if self.not_applicable is not None or self.ratio is None:
            return None
        if self.at_least is not None:
            return self.ratio >= self.at_least
        if self.at_most is not None:
            return self.ratio <= self.at_most
        return None

    def as_json(self) -> dict[str, Any]:
        result: dict[str, Any] = {
            "row": self.row,
            "ours": self.ours,
            "theirs": self.theirs,
            "unit": self.unit,
            "ratio": self.ratio,
        }
        if self.at_most is not None:
            result["at_most"] = self.at_most
        else:
            result["at_least"] = self.at_least
        result["met"] = self.met
        if self.not_applicable is not None:
            result["reason"] = self.not_applicable
        if self.binds is not None:
            result["binds"] = self.binds
        return result


def interleaved(
    sides: dict[str, Callable[[], object]], *, rounds: int = 11, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of each side, the sides taking turns so that drift hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name, call in sides.items():
            begin = time.perf_counter()
            call()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def write_json(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
