"""What an interrupted pack run had finished, so that the next one goes on from there.

The journal lies in the staging directory: a line for the job (settings and the source's
fingerprint), then one for each layer that is durable, in the order of the plan. Each line begins
with the xxh3 of the rest of it, so a line that a crash left half written is none. A run with
another job starts afresh.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import xxhash

from tierd_layouts.container import shard_file_name
from tierd_layouts.errors import FormatError
from tierd_layouts.index import FORMAT_VERSION, PackIndex
from tierd_layouts.records import Layer, Shard
from tierd_tools.pack_staging import write_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tierd_tools.pack_tensor import EncodedTensor

JOURNAL_FILE = ".tierd-journal"


@dataclass(frozen=True, slots=True)
class FinishedLayer:
    """A layer that is durable, and what the packer did to its tensors.

    digests: tensor -> xxh3_128 of its source bytes. The others are names of tensors: `left` were
    sparse enough before, `not_finite` could not be quantised.
    """

    layer: Layer
    digests: Mapping[str, str]
    pruned: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()

    @property
    def shard(self) -> int:
        """Position of its shard in the index."""
        return self.layer.extents[0].shard


class LayerNotes:
    """Collects what happens to the tensors of one layer."""

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}
        self._pruned: list[str] = []
        self._left: list[str] = []
        self._not_finite: list[str] = []

    def add(self, tensor: EncodedTensor) -> None:
        """A tensor that was written."""
        self._digests[tensor.name] = tensor.source_digest
        for happened, names in (
            (tensor.pruned, self._pruned),
            (tensor.left, self._left),
            (tensor.not_finite, self._not_finite),
        ):
            if happened:
                names.append(tensor.name)

    def finished(self, layer: Layer) -> FinishedLayer:
        """All of them, with what the index says of their layer."""
        return FinishedLayer(
            layer, self._digests, tuple(self._pruned), tuple(self._left), tuple(self._not_finite)
        )


@dataclass(slots=True)
class Journal:
    """The finished layers, which are the first ones of the plan."""

    path: Path
    job: str
    finished: list[FinishedLayer] = field(default_factory=list)

    @classmethod
    def start(cls, directory: Path, job: str) -> Journal:
        """A new journal, durable."""
        journal = cls(directory / JOURNAL_FILE, job)
        journal.keep(0)
        return journal

    @classmethod
    def load(cls, directory: Path, job: str) -> Journal | None:
        """The journal of `job` in `directory`; None when there is none, or another job's."""
        path = directory / JOURNAL_FILE
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return None
        if _unsealed(lines[0]) != {"job": job}:
            return None
        finished: list[FinishedLayer] = []
        for line in lines[1:]:
            layer = _read_layer(_unsealed(line))
            if layer is None:
                break
            finished.append(layer)
        journal = cls(path, job, finished)
        if len(finished) != len(lines) - 2 or lines[-1]:  # something is no line, or not a whole one
            journal.keep(len(finished))
        return journal

    def add(self, finished: FinishedLayer) -> None:
        """Records a layer that is durable, durably."""
        with self.path.open("ab") as file:
            file.write(_sealed(_write_layer(finished)))
            file.flush()
            os.fdatasync(file.fileno())
        self.finished.append(finished)

    def keep(self, count: int) -> None:
        """Forgets all but the first `count` layers."""
        del self.finished[count:]
        lines = [_sealed({"job": self.job}), *(_sealed(_write_layer(x)) for x in self.finished)]
        write_file(self.path, b"".join(lines))

    @property
    def nbytes(self) -> int:
        """Of all finished layers."""
        return sum(finished.layer.nbytes for finished in self.finished)


def _sealed(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return f"{xxhash.xxh3_64_intdigest(text):016x} ".encode() + text + b"\n"


def _unsealed(line: bytes) -> Any:
    """The content of a line without its newline; None for what is no line."""
    seal, _, text = line.partition(b" ")
    if seal != f"{xxhash.xxh3_64_intdigest(text):016x}".encode():
        return None
    try:
        return json.loads(text)
    except ValueError:
        return None


def _write_layer(finished: FinishedLayer) -> dict[str, Any]:
    """The layer as the index of a pack of it alone, which `PackIndex` writes and checks."""
    (extent,) = finished.layer.extents
    index = PackIndex(
        version=FORMAT_VERSION,
        tool="tierctl pack, unfinished",
        source_digest="",
        shards=(Shard(shard_file_name(extent.shard), extent.offset + extent.nbytes),),
        layers=(replace(finished.layer, extents=(replace(extent, shard=0),)),),
    )
    return {
        "index": index.to_json().decode(),
        "shard": extent.shard,
        "digests": dict(finished.digests),
        "pruned": finished.pruned,
        "left": finished.left,
        "not_finite": finished.not_finite,
    }


def _read_layer(content: Any) -> FinishedLayer | None:
    """None for what is not a layer that this version wrote: nothing to build on."""
    try:
        (layer,) = PackIndex.parse(content["index"].encode(), where=JOURNAL_FILE).layers
        (extent,) = layer.extents
        return FinishedLayer(
            layer=replace(layer, extents=(replace(extent, shard=int(content["shard"])),)),
            digests={str(name): str(digest) for name, digest in content["digests"].items()},
            pruned=tuple(content["pruned"]),
            left=tuple(content["left"]),
            not_finite=tuple(content["not_finite"]),
        )
    except (FormatError, ValueError, KeyError, TypeError, AttributeError):
        return None
