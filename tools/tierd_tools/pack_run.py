"""One run of the packer: layers to shards, then the index, then the pack's name.

Everything happens in a hidden sibling of the target. A run that is killed leaves it, and the next
run with the same source and settings goes on after the last durable layer.
"""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import xxhash

from tierd_layouts.container import open_pack, shard_file_name, write_index
from tierd_layouts.index import FORMAT_VERSION, INDEX_FILE, PackIndex
from tierd_layouts.records import Shard
from tierd_tools.checkpoint import CONFIG
from tierd_tools.errors import DiskFull, PackError
from tierd_tools.pack_calibration import CALIBRATION_FILE, cached_norms
from tierd_tools.pack_check import first_wrong
from tierd_tools.pack_flow import encoding
from tierd_tools.pack_journal import JOURNAL_FILE, FinishedLayer, Journal, LayerNotes
from tierd_tools.pack_resume import layers_of, take_over
from tierd_tools.pack_shard import ShardWriter, reserved_header_bytes
from tierd_tools.pack_staging import (
    adopt_access,
    copy_file,
    refusals,
    refuse_unless_replaceable,
    size_text,
    write_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tierd_layouts.index import Layer
    from tierd_tools.checkpoint import Checkpoint
    from tierd_tools.pack_plan import PackPlan, PlannedLayer
    from tierd_tools.pack_settings import Settings
    from tierd_tools.pack_staging import Staging
    from tierd_tools.pack_tensor import EncodedTensor, Norms
    from tierd_tools.progress import Progress, Stage

#: the estimate comes from samples; a run is refused beforehand only when it is surely too large
_SURE = 0.9


class PackRun:
    """One pack run, from the staging directory as it was found to the published pack."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        the_plan: PackPlan,
        settings: Settings,
        staging: Staging,
        progress: Progress,
    ) -> None:
        self._checkpoint = checkpoint
        self._plan = the_plan
        self._settings = settings
        self._staging = staging
        self._progress = progress
        self._published = False
        self._fingerprint = checkpoint.fingerprint()
        self._header_bytes = [reserved_header_bytes(shard) for shard in the_plan.shards]
        self._journal = self._resume()
        self.reused = len(self._journal.finished)

    @property
    def finished(self) -> Sequence[FinishedLayer]:
        """All layers, once the pack is written."""
        return self._journal.finished

    def write(self) -> PackIndex:
        """Writes what the journal does not have, and the index; verifies what it wrote."""
        self._refuse_without_room()
        norms = self._norms()
        with refusals(self._staging.target, self._plan.estimated_bytes):
            shards = self._write_shards(norms)
            if self._checkpoint.fingerprint() != self._fingerprint:
                self._journal.keep(0)
                raise PackError(f"{self._checkpoint.path} changed while it was packed")
            self._copy_control_files()
            index = self._index(shards)
            write_index(self._staging.path, index)
        self._verify()
        return index

    def publish(self, index: PackIndex) -> bool:
        """Gives the pack its name. Returns whether it replaced another."""
        target = self._staging.target
        refuse_unless_replaceable(target, INDEX_FILE)  # it may have changed in these hours
        replaces = (target / INDEX_FILE).exists()
        with refusals(target):
            (self._staging.path / CALIBRATION_FILE).unlink(missing_ok=True)
            if replaces:
                adopt_access(self._staging.path, target, INDEX_FILE)
            self._staging.publish(replace=True)
            self._published = True
            (target / JOURNAL_FILE).unlink(missing_ok=True)
            self._staging.remove()
        return replaces

    def what_is_kept(self) -> str:
        """After a failure: removes what cannot be used again, and says what can."""
        if self._published:
            return "the new pack is in place"
        again = f"in {self._staging.path}: the same command goes on from there"
        if self._journal.finished:
            layers = sum(len(shard) for shard in self._plan.shards)
            return (
                f"{len(self._journal.finished)} of {layers} layers "
                f"({size_text(self._journal.nbytes)}) are kept {again}"
            )
        if (self._staging.path / CALIBRATION_FILE).exists():
            return f"the calibration is kept {again}"
        self._staging.clear()
        return "nothing was kept"

    def _resume(self) -> Journal:
        shards = [[layer.name for layer in shard] for shard in self._plan.shards]
        parts = [FORMAT_VERSION, self._settings.text(), self._fingerprint, shards]
        job = xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
        path = self._staging.path
        with refusals(self._staging.target):
            journal = Journal.load(path, job)
            if journal is None:
                self._staging.clear()
                return Journal.start(path, job)
            take_over(path, journal, self._plan.shards, self._header_bytes, self._progress)
        return journal

    def _refuse_without_room(self) -> None:
        free = self._staging.free_bytes()
        needed = self._plan.estimated_bytes
        written = self._journal.nbytes
        if written + free < needed * _SURE:
            raise DiskFull(
                f"{self._staging.target}: the pack needs about {size_text(needed)}, "
                f"{size_text(written)} written, {size_text(free)} free"
            )

    def _norms(self) -> Norms:
        tensors = [tensor for layer in self._missing() for tensor in layer.tensors]
        if self._settings.prune != "wanda" or not any(tensor.sparsity for tensor in tensors):
            return {}
        return cached_norms(self._staging.path, self._checkpoint, self._settings, self._progress)

    def _missing(self) -> list[PlannedLayer]:
        layers = [layer for shard in self._plan.shards for layer in shard]
        return layers[len(self._journal.finished) :]

    def _write_shards(self, norms: Norms) -> list[Shard]:
        settings, path = self._settings, self._staging.path
        missing = self._missing()
        tensors = [tensor for layer in missing for tensor in layer.tensors]
        shards: list[Shard] = []
        with (
            self._progress.stage("packing", sum(x.source_bytes for x in missing)) as stage,
            encoding(tensors, settings.prune, settings.group, norms) as encoded,
        ):
            for number, planned in enumerate(self._plan.shards):
                layers = layers_of(self._journal, number)
                final = path / shard_file_name(number)
                if len(layers) == len(planned) and final.exists():
                    shards.append(Shard(final.name, final.stat().st_size))
                    continue
                with ShardWriter(path, number, self._header_bytes[number], layers) as writer:
                    self._write_layers(writer, planned[len(layers) :], encoded, stage)
                    shards.append(writer.finish())
        return shards

    def _write_layers(
        self,
        writer: ShardWriter,
        layers: Sequence[PlannedLayer],
        encoded: Iterator[EncodedTensor],
        stage: Stage,
    ) -> None:
        """While a layer goes to the device and into the journal, the next one is written."""
        with ThreadPoolExecutor(1, thread_name_prefix="tierd-sync") as syncing:
            durable: Future[None] | None = None
            for layer in layers:
                writer.begin_layer(layer.name)
                notes = LayerNotes()
                for _ in layer.tensors:
                    tensor = next(encoded)
                    writer.add(tensor)
                    notes.add(tensor)
                    stage.advance(tensor.source_bytes)
                finished = notes.finished(writer.end_layer())
                if durable:
                    durable.result()
                durable = syncing.submit(self._make_durable, writer, finished)
            if durable:
                durable.result()

    def _make_durable(self, writer: ShardWriter, finished: FinishedLayer) -> None:
        writer.sync()
        self._journal.add(finished)

    def _index(self, shards: Sequence[Shard]) -> PackIndex:
        digests: dict[str, str] = {}
        for finished in self._journal.finished:
            digests.update(finished.digests)
        for alias, stored in self._plan.aliases.items():
            digests[alias] = digests[stored]
        return PackIndex(
            version=FORMAT_VERSION,
            tool=self._settings.text(),
            source_digest=_source_digest(self._checkpoint, digests),
            shards=tuple(shards),
            layers=tuple(finished.layer for finished in self._journal.finished),
            aliases=dict(self._plan.aliases),
            metadata=dict(self._checkpoint.metadata),
        )

    def _copy_control_files(self) -> None:
        for file in self._checkpoint.control_files:
            copy = self._staging.path / file.name
            if file.name == CONFIG and self._checkpoint.config is not None:
                write_file(copy, self._checkpoint.config)
            else:
                copy_file(file, copy)

    def _verify(self) -> None:
        """The layers of this run: those of earlier ones were read when it began."""
        path = self._staging.path
        index = open_pack(path)
        layers: Sequence[Layer] = index.layers[self.reused :]
        with self._progress.stage("verifying", sum(layer.nbytes for layer in layers)) as stage:
            wrong = first_wrong(path, index, layers, stage)
        if wrong is not None:
            number, error = wrong
            self._journal.keep(self.reused + number)
            raise PackError(f"what was written reads back wrong: {error}") from error


def _source_digest(checkpoint: Checkpoint, digests: Mapping[str, str]) -> str:
    """Names the content of the checkpoint, however it was sharded."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape, digests[name]]).encode())
    return f"xxh3_128:{digest.hexdigest()}"
