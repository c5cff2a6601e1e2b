"""The norms that Wanda needs, kept beside the unfinished pack: calibrating may take hours.

The file is the xxh3 of its content, 16 hex digits, and then a safetensors file of float32 vectors
by the names of the weights. It belongs to the job of the journal beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

from tierd_tools.errors import PackError
from tierd_tools.pack_staging import refusals, write_file

if TYPE_CHECKING:
    from pathlib import Path

    from tierd_tools.checkpoint import Checkpoint
    from tierd_tools.pack_settings import Settings
    from tierd_tools.pack_tensor import Norms
    from tierd_tools.progress import Progress

CALIBRATION_FILE = ".tierd-calibration"
_SEAL_BYTES = 16


def cached_norms(
    directory: Path, checkpoint: Checkpoint, settings: Settings, progress: Progress
) -> Norms:
    """The norm of each input feature of each weight that is to be pruned, calibrated at most once.

    Raises what `calibrate.input_norms` raises; PackError when the norms cannot be kept.
    """
    path = directory / CALIBRATION_FILE
    norms = _load(path)
    if norms is not None:
        progress.note(f"calibration: {len(norms)} tensors, from an earlier run")
        return norms
    if settings.calibration is None:
        raise PackError("calibration: there is no text")
    from safetensors.numpy import save

    from tierd_tools.calibrate import input_norms

    norms = input_norms(
        checkpoint,
        settings.calibration,
        settings.sparsities,
        windows=settings.windows,
        progress=progress,
    )
    content = save(dict(norms))
    with refusals(directory):
        write_file(path, _seal(content) + content)
    return norms


def _load(path: Path) -> Norms | None:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    seal, content = content[:_SEAL_BYTES], content[_SEAL_BYTES:]
    if seal != _seal(content):
        return None
    from safetensors.numpy import load

    norms: Norms = load(content)
    return norms


def _seal(content: bytes) -> bytes:
    return f"{xxhash.xxh3_64_intdigest(content):016x}".encode()
