"""A pack back to an ordinary Hugging Face checkpoint, bit for bit."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tierd_layouts.container import open_pack, pack_folder, read_layer, tensor_bits
from tierd_layouts.dtypes import ITEM_BYTES
from tierd_layouts.safetensors_file import Entry, build_header
from tierd_tools.checkpoint import SHARD_INDEX, SINGLE_FILE, control_file_names
from tierd_tools.errors import BadSetting, DiskFull, TargetRefused
from tierd_tools.pack_staging import (
    Staging,
    any_entry,
    copy_file,
    refusals,
    size_text,
    write_file,
)
from tierd_tools.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from tierd_layouts.index import PackIndex, Tensor

SUFFIX = "tierd-unpacking"
#: Hugging Face's own limit: 5 GB
SHARD_BYTES = 5_000_000_000
_WRITE_BYTES = 64 << 20
_HEADER_ALIGNMENT = 8  # safetensors'


@dataclass(frozen=True, slots=True)
class UnpackReport:
    """What was written."""

    out_dir: str
    tensors: int  #: tied ones that the checkpoint held twice count twice
    shards: int
    nbytes: int
    seconds: float

    def summary(self) -> str:
        """One line for a person."""
        rate = self.nbytes / max(self.seconds, 1e-9) / 1e6
        return (
            f"{self.out_dir}: {self.tensors} tensors in {self.shards} shards, "
            f"{size_text(self.nbytes)} in {self.seconds:.1f} s, {rate:,.0f} MB/s"
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor goes: `offset` in the shard file."""

    shard: int
    offset: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """The checkpoint's files, before a byte of them is written."""

    files: tuple[str, ...]
    headers: tuple[bytes, ...]
    places: Mapping[str, _Place]
    tensor_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.tensor_bytes + sum(len(header) for header in self.headers)


def unpack(
    pack_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> UnpackReport:
    """Writes the checkpoint that the pack was made from (after pruning, where it was pruned).

    Every layer is verified before it is used. Needs the memory of one layer and its dense tensors.
    Raises FormatError for a pack that is not right, TargetRefused unless `out_dir` is absent or
    empty, and other PackErrors. On an error nothing is left behind.
    """
    started = time.monotonic()
    progress = progress or SilentProgress()
    target = Path(os.path.realpath(out_dir))
    _refuse_unless_free(target)
    with pack_folder(pack_dir) as folder:
        index = open_pack(folder, where=os.fspath(pack_dir))
        layout = _plan(index)
        with Staging.locked(target, SUFFIX) as staging:
            staging.clear()  # of a run that was killed
            try:
                with refusals(target, layout.total_bytes):
                    _refuse_without_room(staging, layout)
                    _write_tensors(folder, os.fspath(pack_dir), index, layout, staging, progress)
                    _write_control_files(Path(pack_dir), layout, staging)
                    _refuse_unless_free(target)
                    staging.publish(replace=False)
            finally:
                staging.remove()
    return UnpackReport(
        out_dir=str(target),
        tensors=len(layout.places),
        shards=len(layout.files),
        nbytes=layout.tensor_bytes,
        seconds=time.monotonic() - started,
    )


def _refuse_unless_free(target: Path) -> None:
    if not target.name:
        raise BadSetting(f"{target} cannot be written to")
    if os.path.lexists(target) and (not target.is_dir() or any_entry(target)):
        raise TargetRefused(f"{target} exists and is not an empty directory")


def _refuse_without_room(staging: Staging, layout: _Layout) -> None:
    free = staging.free_bytes()
    if free < layout.total_bytes:
        raise DiskFull(
            f"{staging.target}: the checkpoint needs {size_text(layout.total_bytes)}, "
            f"{size_text(free)} free"
        )


def _plan(index: PackIndex) -> _Layout:
    groups: list[list[tuple[str, Tensor]]] = []
    room = -1
    for name, tensor in _named_tensors(index):
        if not groups or tensor.dense_bytes > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append((name, tensor))
        room -= tensor.dense_bytes
    count = len(groups)
    files = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    headers: list[bytes] = []
    places: dict[str, _Place] = {}
    for shard, group in enumerate(groups):
        entries: dict[str, Entry] = {}
        end = 0
        # As the safetensors library orders them, so that every tensor is aligned to its elements.
        for name, tensor in sorted(group, key=lambda item: (-ITEM_BYTES[item[1].dtype], item[0])):
            begin, end = end, end + tensor.dense_bytes
            entries[name] = Entry(tensor.dtype, tensor.shape, begin, end)
        headers.append(build_header(entries, index.metadata, alignment=_HEADER_ALIGNMENT))
        for name, entry in entries.items():
            places[name] = _Place(shard, len(headers[-1]) + entry.begin)
    return _Layout(
        files=tuple(files) if count > 1 else (SINGLE_FILE,),
        headers=tuple(headers),
        places=places,
        tensor_bytes=sum(tensor.dense_bytes for _, tensor in _named_tensors(index)),
    )


def _named_tensors(index: PackIndex) -> Iterable[tuple[str, Tensor]]:
    """Every tensor of the checkpoint; tied ones follow the one that is stored."""
    aliases = _aliases_of(index)
    for layer in index.layers:
        for tensor in layer.tensors:
            yield tensor.source, tensor
            for alias in aliases.get(tensor.name, ()):
                yield alias, tensor


def _aliases_of(index: PackIndex) -> dict[str, list[str]]:
    aliases: dict[str, list[str]] = {}
    for alias, stored in index.aliases.items():
        aliases.setdefault(stored, []).append(alias)
    return aliases


def _write_tensors(
    folder: int,
    where: str,
    index: PackIndex,
    layout: _Layout,
    staging: Staging,
    progress: Progress,
) -> None:
    aliases = _aliases_of(index)
    with ExitStack() as stack:
        descriptors = []
        for file, header in zip(layout.files, layout.headers, strict=True):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            descriptor = os.open(staging.path / file, flags, 0o666)
            stack.callback(os.close, descriptor)
            _write_at(descriptor, memoryview(header), 0)
            descriptors.append(descriptor)
        stage = stack.enter_context(progress.stage("unpacking", layout.tensor_bytes))
        pool = stack.enter_context(ThreadPoolExecutor(len(os.sched_getaffinity(0))))
        for layer in index.layers:
            content = read_layer(folder, index, layer, where=where)

            def decode(tensor: Tensor, content: bytes = content) -> int:
                bits = tensor_bits(content, tensor).reshape(-1)
                names = [tensor.source, *aliases.get(tensor.name, ())]
                for name in names:
                    place = layout.places[name]
                    view = bits.data.cast("B") if bits.size else memoryview(b"")
                    _write_at(descriptors[place.shard], view, place.offset)
                return bits.nbytes * len(names)

            _drain(pool, decode, layer.tensors, stage.advance)
        for descriptor in descriptors:
            os.fsync(descriptor)


def _drain(
    pool: ThreadPoolExecutor,
    decode: Callable[[Tensor], int],
    tensors: Sequence[Tensor],
    advance: Callable[[int], None],
) -> None:
    """Runs `decode` on all tensors; no more of them are in memory than the pool has threads."""
    for nbytes in pool.map(decode, tensors):
        advance(nbytes)


def _write_at(descriptor: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < view.nbytes:
        done += os.pwrite(descriptor, view[done : done + _WRITE_BYTES], offset + done)


def _write_control_files(pack_dir: Path, layout: _Layout, staging: Staging) -> None:
    names = (entry.name for entry in pack_dir.iterdir() if entry.is_file())
    for name in control_file_names(names):
        copy_file(pack_dir / name, staging.path / name)
    if len(layout.files) == 1:
        return
    weight_map = {name: layout.files[place.shard] for name, place in sorted(layout.places.items())}
    content = {"metadata": {"total_size": layout.tensor_bytes}, "weight_map": weight_map}
    write_file(staging.path / SHARD_INDEX, json.dumps(content, indent=2).encode() + b"\n")
