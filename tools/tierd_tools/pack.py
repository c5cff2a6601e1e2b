"""A Hugging Face checkpoint to a pack: pruned on the way if asked for, resumable, verified.

Everything happens in a hidden sibling of the target. A run that is killed leaves it, and the next
run with the same source and settings goes on after the last durable shard. The pack appears under
its name when all of it was read back and found right; a pack that was there is exchanged with it.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import xxhash

from tierd import __version__
from tierd_layouts.container import (
    open_pack,
    shard_file_name,
    verify_layer,
    write_index,
    write_shard,
)
from tierd_layouts.errors import FormatError, NameRefused
from tierd_layouts.index import FORMAT_VERSION, INDEX_FILE, PackIndex
from tierd_layouts.names import check_model_name
from tierd_tools.checkpoint import CONFIG, Checkpoint
from tierd_tools.errors import BadSetting, CheckpointError, DiskFull, PackError
from tierd_tools.pack_encode import encoding, join
from tierd_tools.pack_journal import JOURNAL_FILE, Journal
from tierd_tools.pack_plan import PackPlan, plan
from tierd_tools.pack_staging import (
    Staging,
    adopt_access,
    copy_file,
    refusals,
    refuse_unless_replaceable,
    size_text,
    write_file,
)
from tierd_tools.progress import Progress, SilentProgress
from tierd_tools.sparsity import check_sparsity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd_layouts.container import EncodedLayer
    from tierd_layouts.index import Layer

SUFFIX = "tierd-packing"
TOOL = f"tierctl pack {__version__}"
CODECS = ("raw",)
#: the estimate comes from samples; a run is refused beforehand only when it is surely too large
_SURE = 0.95


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a pack run did."""

    pack_dir: str
    source_bytes: int
    pack_bytes: int  #: of all layers: what one pass over the model reads
    layers: int
    tensors: int
    raw_tensors: int  #: stored as bitmap and values
    pruned_tensors: int
    raw_zero_share: float  #: of the elements of the raw tensors
    aliases: int
    shards: int
    shards_reused: int  #: finished by an earlier run that was stopped
    replaced: bool  #: a pack of that name was there
    seconds: float

    def summary(self) -> str:
        """A few lines for a person."""
        ratio = self.source_bytes / self.pack_bytes if self.pack_bytes else 0.0
        rate = self.source_bytes / max(self.seconds, 1e-9) / 1e6
        lines = [
            f"{self.pack_dir}: {self.layers} layers, {self.tensors} tensors in {self.shards} shards"
            f"{' (replaced)' if self.replaced else ''}",
            f"{size_text(self.source_bytes)} -> {size_text(self.pack_bytes)} ({ratio:.2f}x) in "
            f"{self.seconds:.1f} s, {rate:,.0f} MB/s",
            f"{self.raw_tensors} tensors as bitmap and values, {100 * self.raw_zero_share:.1f} % "
            f"zeros; {self.pruned_tensors} pruned; {self.aliases} aliases",
        ]
        if self.shards_reused:
            lines.append(f"{self.shards_reused} shards were finished by an earlier run")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Settings:
    prune: str
    sparsity: float | None
    codec: str

    def text(self) -> str:
        prune = "" if self.sparsity is None else f" --sparsity {self.sparsity!r}"
        return f"{TOOL} --prune {self.prune}{prune} --codec {self.codec}"


def pack(
    model_dir: str | os.PathLike[str],
    pack_dir: str | os.PathLike[str],
    *,
    prune: Literal["none", "magnitude"] = "none",
    sparsity: float | None = None,
    codec: str = "raw",
    progress: Progress | None = None,
) -> PackReport:
    """Writes the pack of a checkpoint and says what was done.

    Raises BadSetting, CheckpointError, or another PackError. Whatever is raised, a pack that was at
    `pack_dir` is still there and whole.
    """
    started = time.monotonic()
    progress = progress or SilentProgress()
    settings = _checked(prune, sparsity, codec)
    target = _target(Path(pack_dir))
    checkpoint = Checkpoint.open(model_dir)
    refuse_unless_replaceable(target, INDEX_FILE)
    the_plan = plan(checkpoint, settings.sparsity)
    if settings.prune != "none" and not the_plan.pruned:
        raise PackError(f"{model_dir}: nothing to prune: no numbered layer has a 2-D .weight")
    with Staging.locked(target, SUFFIX) as staging:
        run = _Run(checkpoint, the_plan, settings, staging, progress)
        try:
            index = run.write()
            replaced = run.publish(index)
        except (PackError, CheckpointError) as error:
            raise type(error)(f"{error}; {run.what_is_kept()}") from error
    raw = [t for layer in index.layers for t in layer.tensors if t.codec == "raw"]
    elements = sum(t.shape[0] * t.shape[1] for t in raw)
    return PackReport(
        pack_dir=str(target),
        source_bytes=checkpoint.nbytes,
        pack_bytes=index.pack_bytes,
        layers=len(index.layers),
        tensors=sum(len(layer.tensors) for layer in index.layers),
        raw_tensors=len(raw),
        pruned_tensors=the_plan.pruned,
        raw_zero_share=1.0 - sum(t.nnz for t in raw) / elements if elements else 0.0,
        aliases=len(index.aliases),
        shards=len(index.shards),
        shards_reused=run.reused,
        replaced=replaced,
        seconds=time.monotonic() - started,
    )


class _Run:
    """One pack run, from the staging directory as it was found to the published pack."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        the_plan: PackPlan,
        settings: _Settings,
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
        self._journal = self._resume()
        self.reused = len(self._journal.shards)

    def write(self) -> PackIndex:
        """Writes what the journal does not have, and the index; verifies what it wrote."""
        self._refuse_without_room()
        with refusals(self._staging.target, self._plan.estimated_bytes):
            self._write_shards()
            if self._checkpoint.fingerprint() != self._fingerprint:
                self._journal.keep(0)
                raise PackError(f"{self._checkpoint.path} changed while it was packed")
            for file in self._checkpoint.control_files:
                copy_file(file, self._staging.path / file.name)
            if self._checkpoint.config is not None:
                write_file(self._staging.path / CONFIG, self._checkpoint.config)
            index = self._index()
            write_index(self._staging.path, index)
        self._verify([x for x in index.layers if x.extents[0].shard >= self.reused])
        return index

    def publish(self, index: PackIndex) -> bool:
        """Gives the pack its name. Returns whether it replaced another."""
        target = self._staging.target
        refuse_unless_replaceable(target, INDEX_FILE)  # it may have changed in these hours
        replaces = (target / INDEX_FILE).exists()
        with refusals(target):
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
        if not self._journal.shards:
            self._staging.clear()
            return "nothing was kept"
        done = sum(shard.nbytes for shard in self._journal.shards)
        return (
            f"{len(self._journal.shards)} of {len(self._plan.shards)} shards ({size_text(done)}) "
            f"are kept in {self._staging.path}: the same command goes on from there"
        )

    def _resume(self) -> Journal:
        shards = [[layer.name for layer in shard] for shard in self._plan.shards]
        parts = [FORMAT_VERSION, self._settings.text(), self._fingerprint, shards]
        job = xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())
        path = self._staging.path
        journal = Journal.load(path, job)
        if journal is None:
            self._staging.clear()
            return Journal(path / JOURNAL_FILE, job)
        with refusals(self._staging.target):
            files = {JOURNAL_FILE, *(shard.file for shard in journal.shards)}
            for entry in path.iterdir():
                if entry.name not in files:
                    entry.unlink()
            journal.keep(self._first_wrong_shard(journal))
        return journal

    def _first_wrong_shard(self, journal: Journal) -> int:
        """Index of the first finished shard that is no longer what the journal says."""
        index = journal.index()
        with self._progress.stage("checking finished shards", index.pack_bytes) as stage:
            for layer in index.layers:
                try:
                    verify_layer(self._staging.path, index, layer, on_block=stage.advance)
                except FormatError as error:
                    self._progress.note(f"{error}: starting again from here")
                    return layer.extents[0].shard
        return len(index.shards)

    def _refuse_without_room(self) -> None:
        written = sum(shard.nbytes for shard in self._journal.shards)
        free = self._staging.free_bytes()
        needed = self._plan.estimated_bytes
        if written + free < needed * _SURE:
            raise DiskFull(
                f"{self._staging.target}: the pack needs about {size_text(needed)}, "
                f"{size_text(written)} written, {size_text(free)} free"
            )

    def _write_shards(self) -> None:
        first = len(self._journal.shards)
        shards = self._plan.shards[first:]
        tensors = [tensor for shard in shards for layer in shard for tensor in layer.tensors]
        total = sum(tensor.source.nbytes for tensor in tensors)
        with (
            self._progress.stage("packing", total) as stage,
            encoding(tensors, self._settings.sparsity) as encoded,
            ThreadPoolExecutor(1, thread_name_prefix="tierd-write") as writer,
        ):
            writing: Future[None] | None = None
            for number, shard in enumerate(shards, first):
                layers = []
                digests: dict[str, str] = {}
                for layer in shard:
                    parts = []
                    for tensor in layer.tensors:
                        done = next(encoded)
                        parts.append(done.part)
                        digests[tensor.source.name] = done.source_digest
                        stage.advance(done.source_bytes)
                    layers.append(join(layer.name, parts))
                if writing:
                    writing.result()
                writing = writer.submit(self._write_shard, number, layers, digests)
            if writing:
                writing.result()

    def _write_shard(
        self, number: int, layers: Sequence[EncodedLayer], digests: dict[str, str]
    ) -> None:
        """In the writer's thread: the processors need not wait for the device."""
        path = self._staging.path / shard_file_name(number)
        self._journal.add(*write_shard(path, number, layers), digests)

    def _index(self) -> PackIndex:
        digests = dict(self._journal.digests)
        for alias, stored in self._plan.aliases.items():
            digests[alias] = digests[stored]
        return PackIndex(
            version=FORMAT_VERSION,
            tool=self._settings.text(),
            source_digest=_source_digest(self._checkpoint, digests),
            shards=tuple(self._journal.shards),
            layers=tuple(self._journal.layers),
            aliases=dict(self._plan.aliases),
            metadata=dict(self._checkpoint.metadata),
        )

    def _verify(self, layers: Sequence[Layer]) -> None:
        path = self._staging.path
        index = open_pack(path)
        with self._progress.stage("verifying", sum(layer.nbytes for layer in layers)) as stage:
            for layer in layers:
                try:
                    verify_layer(path, index, layer, where=str(path), on_block=stage.advance)
                except FormatError as error:
                    self._journal.keep(layer.extents[0].shard)
                    raise PackError(f"what was written reads back wrong: {error}") from error


def _checked(prune: str, sparsity: float | None, codec: str) -> _Settings:
    if codec not in CODECS:
        raise BadSetting(f"codec {codec!r} is unknown: {', '.join(CODECS)}")
    if prune not in ("none", "magnitude"):
        raise BadSetting(f"prune {prune!r} is unknown: none, magnitude")
    if prune == "none" and sparsity is not None:
        raise BadSetting(f"sparsity {sparsity} without --prune magnitude has no effect")
    if prune == "magnitude":
        if sparsity is None:
            raise BadSetting("prune magnitude needs a sparsity in [0, 1)")
        check_sparsity(sparsity)
    return _Settings(prune, sparsity, codec)


def _target(pack_dir: Path) -> Path:
    target = Path(os.path.realpath(pack_dir))
    try:
        check_model_name(target.name)
    except NameRefused as error:
        raise BadSetting(f"{pack_dir}: {error}") from error
    return target


def _source_digest(checkpoint: Checkpoint, digests: dict[str, str]) -> str:
    """Names the content of the checkpoint, however it was sharded."""
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape, digests[name]]).encode())
    return f"xxh3_128:{digest.hexdigest()}"
