"""Whether a pack holds what its index promises, byte for byte and tile for tile."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tierd_layouts.container import open_pack, pack_folder, read_layer, validate_layer
from tierd_tools.errors import VerifyError
from tierd_tools.pack_staging import size_text
from tierd_tools.progress import Progress, SilentProgress


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read and found right."""

    pack_dir: str
    layers: int
    tensors: int
    codecs: dict[str, int]  #: how many tensors each codec stores
    shards: int
    pack_bytes: int
    tool: str  #: what wrote the pack
    source_digest: str
    seconds: float

    def summary(self) -> str:
        """Two lines for a person."""
        codecs = ", ".join(f"{count} {codec}" for codec, count in self.codecs.items())
        rate = self.pack_bytes / max(self.seconds, 1e-9) / 1e6
        return (
            f"{self.pack_dir}: every block and tile is right: {self.layers} layers, {self.tensors} "
            f"tensors ({codecs}), {self.shards} shards\n"
            f"{size_text(self.pack_bytes)} in {self.seconds:.1f} s, {rate:,.0f} MB/s"
        )


def verify(pack_dir: str | os.PathLike[str], *, progress: Progress | None = None) -> VerifyReport:
    """Reads all of a pack: index, headers, sizes, the hash of every block, the rules of every tile.

    Needs the memory of one layer. Raises the FormatError that names the first thing that is wrong
    (of a block: layer, checksum expected and found), or VerifyError.
    """
    started = time.monotonic()
    progress = progress or SilentProgress()
    where = os.fspath(pack_dir)
    with pack_folder(pack_dir) as folder:
        index = open_pack(folder, where=where)
        if not (Path(pack_dir) / "config.json").is_file():
            raise VerifyError(f"{where} has no config.json: no model can be built from it")
        with progress.stage("verifying", index.pack_bytes) as stage:
            for layer in index.layers:
                validate_layer(read_layer(folder, index, layer, where=where), layer)
                stage.advance(layer.nbytes)
    tensors = [tensor for layer in index.layers for tensor in layer.tensors]
    return VerifyReport(
        pack_dir=where,
        layers=len(index.layers),
        tensors=len(tensors),
        codecs=dict(sorted(Counter(tensor.codec for tensor in tensors).items())),
        shards=len(index.shards),
        pack_bytes=index.pack_bytes,
        tool=index.tool,
        source_digest=index.source_digest,
        seconds=time.monotonic() - started,
    )
