"""Does the scheduler decide fast enough, and do its reads keep the device busy?

The rows are those of its parts, which can also be run alone: `make bench ONLY=scheduler_reads`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd_tools.bench import scheduler_core, scheduler_reads

if TYPE_CHECKING:
    from tierd_tools.benchmark import Row

PARTS = (scheduler_core, scheduler_reads)


def run() -> list[Row]:
    return [row for part in PARTS for row in part.run()]
