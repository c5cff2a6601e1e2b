"""Whether a pack holds what its index promises, byte for byte and tile for tile."""

from __future__ import annotations

import os
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tierd_layouts.container import open_pack, pack_folder, read_layer, validate_layer
from tierd_tools.checkpoint import (
    CONFIG,
    control_file_names,
    plain_files,
    read_config,
    read_json,
)
from tierd_tools.errors import CheckpointError, VerifyError
from tierd_tools.in_flight import in_order
from tierd_tools.pack_staging import size_text
from tierd_tools.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from tierd_layouts.index import Layer

MAX_WORKERS = 8
#: layers that are checked at a time take no more than this, or are one
LIMIT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read and found right."""

    pack_dir: str
    layers: int
    tensors: int
    codecs: dict[str, int]  #: how many tensors each codec stores
    shards: int
    pack_bytes: int
    control_files: int  #: those in JSON, which were read
    tool: str  #: what wrote the pack
    source_digest: str
    seconds: float

    def summary(self) -> str:
        """Two lines for a person."""
        codecs = ", ".join(f"{count} {codec}" for codec, count in self.codecs.items())
        rate = self.pack_bytes / max(self.seconds, 1e-9) / 1e6
        return (
            f"{self.pack_dir}: every block and tile is right: {self.layers} layers, {self.tensors} "
            f"tensors ({codecs}), {self.shards} shards; JSON in {self.control_files} files\n"
            f"{size_text(self.pack_bytes)} in {self.seconds:.1f} s, {rate:,.0f} MB/s"
        )


def _check_control_files(pack: Path) -> int:
    """That a model can be built from them, as far as that is known without one: no index has their
    hashes. Returns how many are JSON. Raises VerifyError."""
    try:
        names = [n for n in control_file_names(plain_files(pack)) if n.endswith(".json")]
        if CONFIG not in names:
            raise VerifyError(f"{pack} has no {CONFIG}: no model can be built from it")
        for name in names:
            read = read_config if name == CONFIG else read_json
            read(pack / name)
    except CheckpointError as error:
        raise VerifyError(str(error)) from error
    return len(names)


def verify(pack_dir: str | os.PathLike[str], *, progress: Progress | None = None) -> VerifyReport:
    """Reads all of a pack: index, headers, sizes, the hash of every block, the rules of every tile,
    and whether control files are JSON.

    Needs the memory of one layer, or of several up to 1 GiB. Raises the FormatError that names the
    first thing that is wrong (of a block: layer, checksum expected and found), or VerifyError.
    """
    started = time.monotonic()
    progress = progress or SilentProgress()
    where = os.fspath(pack_dir)
    with pack_folder(pack_dir) as folder:
        index = open_pack(folder, where=where)
        control_files = _check_control_files(Path(pack_dir))

        def check(layer: Layer) -> int:
            validate_layer(read_layer(folder, index, layer, where=where), layer)
            return layer.nbytes

        workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
        with (
            progress.stage("verifying", index.pack_bytes) as stage,
            ThreadPoolExecutor(workers, thread_name_prefix="tierd-verify") as pool,
        ):
            try:
                for nbytes in in_order(
                    pool,
                    check,
                    index.layers,
                    cost_bytes=lambda layer: layer.nbytes,
                    result_bytes=lambda _: 0,
                    limit_bytes=LIMIT_BYTES,
                    ahead=2 * workers,
                ):
                    stage.advance(nbytes)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    tensors = [tensor for layer in index.layers for tensor in layer.tensors]
    return VerifyReport(
        pack_dir=where,
        layers=len(index.layers),
        tensors=len(tensors),
        codecs=dict(sorted(Counter(tensor.codec for tensor in tensors).items())),
        shards=len(index.shards),
        pack_bytes=index.pack_bytes,
        control_files=control_files,
        tool=index.tool,
        source_digest=index.source_digest,
        seconds=time.monotonic() - started,
    )
