"""Which layers of an interrupted run can be used, and a staging directory that holds just those."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tierd_layouts.container import shard_file_name
from tierd_layouts.index import FORMAT_VERSION, PackIndex
from tierd_layouts.records import Shard
from tierd_tools.pack_calibration import CALIBRATION_FILE
from tierd_tools.pack_check import first_wrong
from tierd_tools.pack_journal import JOURNAL_FILE, Journal
from tierd_tools.pack_shard import end_of, temporary_path

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tierd_layouts.records import Layer
    from tierd_tools.pack_plan import PlannedLayer
    from tierd_tools.progress import Progress


def take_over(
    staging: Path,
    journal: Journal,
    shards: Sequence[Sequence[PlannedLayer]],
    header_bytes: Sequence[int],
    progress: Progress,
) -> None:
    """Leaves in the journal the first layers that are what it says, and their files in `staging`.

    A shard that has all its layers keeps its name if it has it; the last one, if it has some, has
    its temporary name and ends after them. Raises OSError.
    """
    journal.keep(_as_planned(journal, shards, header_bytes))
    journal.keep(_right(staging, journal, progress))
    keep = {JOURNAL_FILE, CALIBRATION_FILE}
    for number, planned in enumerate(shards):
        layers = layers_of(journal, number)
        final, temporary = staging / shard_file_name(number), temporary_path(staging, number)
        if not layers:
            continue
        if len(layers) == len(planned) and final.exists():
            keep.add(final.name)
            continue
        if final.exists():
            final.rename(temporary)
        os.truncate(temporary, end_of(layers, header_bytes[number]))
        keep.add(temporary.name)
    for entry in staging.iterdir():
        if entry.name not in keep:
            entry.unlink()


def layers_of(journal: Journal, shard: int) -> list[Layer]:
    """The finished layers of a shard."""
    return [finished.layer for finished in journal.finished if finished.shard == shard]


def _as_planned(
    journal: Journal, shards: Sequence[Sequence[PlannedLayer]], header_bytes: Sequence[int]
) -> int:
    """How many of the layers lie where this plan puts them."""
    planned = [(number, layer.name) for number, shard in enumerate(shards) for layer in shard]
    ends: dict[int, int] = {}
    for i, finished in enumerate(journal.finished):
        number = finished.shard
        if i >= len(planned) or planned[i] != (number, finished.layer.name):
            return i
        if finished.layer.extents[0].offset != ends.get(number, header_bytes[number]):
            return i
        ends[number] = end_of([finished.layer], 0)
    return len(journal.finished)


def _right(staging: Path, journal: Journal, progress: Progress) -> int:
    """How many of the layers read back as they were written."""
    if not journal.finished:
        return 0
    shards: list[Shard] = []
    for number in range(1 + max(finished.shard for finished in journal.finished)):
        final, temporary = staging / shard_file_name(number), temporary_path(staging, number)
        path = final if final.exists() else temporary
        shards.append(Shard(path.name, path.stat().st_size if path.exists() else 0))
    index = PackIndex(
        version=FORMAT_VERSION, tool="", source_digest="", shards=tuple(shards), layers=()
    )
    layers = [finished.layer for finished in journal.finished]
    with progress.stage("checking finished layers", journal.nbytes) as stage:
        wrong = first_wrong(staging, index, layers, stage)
    if wrong is None:
        return len(layers)
    number, error = wrong
    progress.note(f"{error}: starting again from here")
    return number
