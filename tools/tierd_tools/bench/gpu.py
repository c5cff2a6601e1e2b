"""Does the GPU tier keep its promises? All rows that need a GPU, or why they could not be run.

`make gpu-acceptance` runs the parts one by one, with a budget of time for each.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tierd_tools.gpu_acceptance.promises import PROMISES

if TYPE_CHECKING:
    from tierd_tools.benchmark import Row


def run() -> list[Row]:
    rows: list[Row] = []
    for name in PROMISES:
        rows += importlib.import_module(f"tierd_tools.bench.{name}").run()
    return rows
