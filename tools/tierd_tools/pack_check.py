"""Layers that were written, read back side by side: one thread is slower than many disks."""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from tierd_layouts.container import verify_layer
from tierd_layouts.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tierd_layouts.index import Layer, PackIndex
    from tierd_tools.progress import Stage

MAX_READERS = 4


def first_wrong(
    directory: Path, index: PackIndex, layers: Sequence[Layer], stage: Stage
) -> tuple[int, FormatError] | None:
    """The position of the first of `layers` that does not read back as the index says, and why.

    index: says where the shards are. Needs 4 MiB for each reader. Raises OSError.
    """
    readers = min(MAX_READERS, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(readers, thread_name_prefix="tierd-check")
    running: deque[Future[None]] = deque()
    try:
        for number, layer in enumerate(layers):
            while len(running) < 2 * readers and number + len(running) < len(layers):
                ahead = layers[number + len(running)]
                running.append(
                    pool.submit(verify_layer, directory, index, ahead, where=str(directory))
                )
            try:
                running.popleft().result()
            except FormatError as error:
                return number, error
            stage.advance(layer.nbytes)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return None
