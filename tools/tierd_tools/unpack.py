"""A pack back to a Hugging Face checkpoint: an ordinary one, bit for bit, or a compressed one."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from tierd_layouts.container import open_pack, pack_folder
from tierd_tools import unpack_bitmask
from tierd_tools.bitmask_config import (
    config_text,
    refuse_section,
    target_patterns,
    with_sparsity,
)
from tierd_tools.checkpoint import CONFIG, SHARD_INDEX, control_file_names, read_config
from tierd_tools.errors import BadSetting, DiskFull, PackError, TargetRefused
from tierd_tools.pack_staging import (
    Staging,
    any_entry,
    copy_file,
    refusals,
    size_text,
    write_file,
)
from tierd_tools.progress import Progress, SilentProgress
from tierd_tools.unpack_bitmask import Census
from tierd_tools.unpack_decode import for_each_weight
from tierd_tools.unpack_plan import Layout, Named, Piece, lay_out, named_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from tierd_layouts.index import PackIndex, Tensor

    Bits = NDArray[np.unsignedinteger[Any]]

Format = Literal["checkpoint", "sparse-bitmask"]
FORMATS: tuple[str, ...] = get_args(Format)
SUFFIX = "tierd-unpacking"
_WRITE_BYTES = 64 << 20
_LOSSY = ("int8", "int4")


@dataclass(frozen=True, slots=True)
class UnpackReport:
    """What was written."""

    out_dir: str
    format: str
    tensors: int  #: weights; tied ones that the checkpoint held twice count twice
    compressed_tensors: int  #: of those, weights that the format stores compressed
    lossy_tensors: int  #: of those, weights that are not what the pack was made from, but near it
    negative_zeros: int  #: elements of -0.0 that the format could not hold: they are 0.0 now
    shards: int
    nbytes: int
    seconds: float

    def summary(self) -> str:
        """A few lines for a person."""
        rate = self.nbytes / max(self.seconds, 1e-9) / 1e6
        lines = [
            f"{self.out_dir}: {self.tensors} tensors in {self.shards} shards, "
            f"{size_text(self.nbytes)} in {self.seconds:.1f} s, {rate:,.0f} MB/s"
        ]
        if self.format == "sparse-bitmask":
            lines.append(
                f"{self.compressed_tensors} tensors as sparse-bitmask; "
                f"{self.negative_zeros} elements of -0.0 became 0.0"
            )
        if self.lossy_tensors:
            lines.append(f"lossy: {self.lossy_tensors} tensors hold rounded values")
        return "\n".join(lines)


def unpack(
    pack_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    format: Format = "checkpoint",
    progress: Progress | None = None,
) -> UnpackReport:
    """Writes the checkpoint that the pack was made from (after pruning and quantisation, if any).

    format: `checkpoint`, or `sparse-bitmask` for what compressed-tensors 0.9 to 0.14 reads: weights
    of linear layers compressed where that is smaller, the others as they are. It loses -0.0.
    Every layer is verified before it is used. Needs the memory of one layer and its dense tensors.
    Raises FormatError or VerifyError for a pack that is not right, TargetRefused unless `out_dir`
    is absent or empty, and other PackErrors. On an error nothing is left behind.
    """
    started = time.monotonic()
    progress = progress or SilentProgress()
    if format not in FORMATS:
        raise BadSetting(f"format {format!r} is unknown: {', '.join(FORMATS)}")
    target = Path(os.path.realpath(out_dir))
    _refuse_unless_free(target)
    with pack_folder(pack_dir) as folder:
        index = open_pack(folder, where=os.fspath(pack_dir))
        run = _Run(Path(pack_dir), folder, index, progress)
        if format == "sparse-bitmask":
            run.count()
        layout = run.layout()
        with Staging.locked(target, SUFFIX) as staging:
            staging.clear()  # of a run that was killed
            try:
                with refusals(target, layout.total_bytes):
                    _refuse_without_room(staging, layout)
                    run.write_tensors(layout, staging)
                    run.write_control_files(layout, staging)
                    _refuse_unless_free(target)
                    staging.publish(replace=False)
            finally:
                staging.remove()
    stored = [tensor for layer in index.layers for tensor in layer.tensors]
    return UnpackReport(
        out_dir=str(target),
        format=format,
        tensors=len(run.named),
        compressed_tensors=len(run.census.values),
        lossy_tensors=sum(tensor.codec in _LOSSY for tensor in stored),
        negative_zeros=run.census.negative_zeros,
        shards=len(layout.files),
        nbytes=layout.tensor_bytes,
        seconds=time.monotonic() - started,
    )


class _Run:
    """One unpack run. Nothing is compressed unless `count` was called."""

    def __init__(self, pack_dir: Path, folder: int, index: PackIndex, progress: Progress) -> None:
        self._pack_dir = pack_dir
        self._folder = folder
        self._index = index
        self._progress = progress
        self._config: dict[str, Any] | None = None  # of a compressed checkpoint
        self.named = named_tensors(index)
        self.census = Census()

    def count(self) -> None:
        """Decides what is compressed, and counts its values. Decodes the whole pack."""
        names = [named.name for named in self.named]
        unpack_bitmask.refuse_misread(names)
        config = read_config(self._pack_dir / CONFIG)
        refuse_section(config, where=str(self._pack_dir / CONFIG))
        with self._progress.stage("counting", self._index.dense_bytes) as stage:
            for_each_weight(
                self._folder, self._index, self.census.add, stage, where=str(self._pack_dir)
            )
        if not self.census.values:
            raise PackError(
                f"{self._pack_dir}: no linear weight gets smaller as sparse-bitmask, and "
                f"{100 * self.census.sparsity:.1f} % of all elements are zeros: prune it first, or "
                "unpack it as a checkpoint"
            )
        targets = target_patterns(self.census.modules, unpack_bitmask.module_paths(names))
        self._config = with_sparsity(config, targets, self.census.sparsity)

    def layout(self) -> Layout:
        return lay_out(map(self._pieces, self.named), self._index.metadata)

    def write_tensors(self, layout: Layout, staging: Staging) -> None:
        names: dict[str, list[Named]] = {}
        for named in self.named:
            names.setdefault(named.tensor.name, []).append(named)
        with ExitStack() as stack:
            descriptors = []
            for file, header in zip(layout.files, layout.headers, strict=True):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                descriptor = os.open(staging.path / file, flags, 0o666)
                stack.callback(os.close, descriptor)
                _write_at(descriptor, memoryview(header), 0)
                descriptors.append(descriptor)

            def write(tensor: Tensor, bits: Bits) -> None:
                for named in names[tensor.name]:
                    for name, content in self._contents(named, bits).items():
                        place = layout.places[name]
                        _write_at(descriptors[place.shard], _bytes_of(content), place.offset)

            stage = stack.enter_context(self._progress.stage("unpacking", self._index.dense_bytes))
            for_each_weight(self._folder, self._index, write, stage, where=str(self._pack_dir))
            for descriptor in descriptors:
                os.fsync(descriptor)

    def write_control_files(self, layout: Layout, staging: Staging) -> None:
        names = (entry.name for entry in self._pack_dir.iterdir() if entry.is_file())
        for name in control_file_names(names):
            if name == CONFIG and self._config is not None:
                write_file(staging.path / name, config_text(self._config))
            else:
                copy_file(self._pack_dir / name, staging.path / name)
        if len(layout.files) > 1:
            write_file(staging.path / SHARD_INDEX, layout.shard_index())

    def _pieces(self, named: Named) -> list[Piece]:
        if named.name in self.census.values:
            return unpack_bitmask.pieces(named, self.census.values[named.name])
        return [Piece(named.name, named.tensor.dtype, named.tensor.shape)]

    def _contents(self, named: Named, bits: Bits) -> Mapping[str, NDArray[Any]]:
        if named.name in self.census.values:
            return unpack_bitmask.contents(named, bits)
        return {named.name: bits}


def _refuse_unless_free(target: Path) -> None:
    if not target.name:
        raise BadSetting(f"{target} cannot be written to")
    if os.path.lexists(target) and (not target.is_dir() or any_entry(target)):
        raise TargetRefused(f"{target} exists and is not an empty directory")


def _refuse_without_room(staging: Staging, layout: Layout) -> None:
    free = staging.free_bytes()
    if free < layout.total_bytes:
        raise DiskFull(
            f"{staging.target}: the checkpoint needs {size_text(layout.total_bytes)}, "
            f"{size_text(free)} free"
        )


def _bytes_of(content: NDArray[Any]) -> memoryview:
    return content.reshape(-1).data.cast("B") if content.size else memoryview(b"")


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < view.nbytes:
        done += os.pwrite(descriptor, view[done : done + _WRITE_BYTES], offset + done)
