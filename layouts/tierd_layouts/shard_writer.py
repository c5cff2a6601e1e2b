"""Encoded layers to a shard file, and an index to tierd.json: never half of either.

Everything is written to a temporary name, flushed to the device and then renamed, so a reader of
the final name sees the old file or the new one, also after a power cut.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import xxhash

from tierd_layouts.errors import DuplicateName
from tierd_layouts.names import PADDING_PREFIX, check_file_name
from tierd_layouts.records import (
    BLOCK_BYTES,
    INDEX_FILE,
    PAGE_BYTES,
    Extent,
    Layer,
    Shard,
)
from tierd_layouts.safetensors_file import Entry, build_header
from tierd_layouts.stored import stored_arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import BinaryIO

    from tierd_layouts.index import PackIndex
    from tierd_layouts.layer_builder import EncodedLayer
    from tierd_layouts.records import Tensor

TEMPORARY_SUFFIX = ".tmp"


def shard_file_name(shard_index: int) -> str:
    """Returns the name of a shard: they count from 1, as Hugging Face's do."""
    return f"tierd-{shard_index + 1:05d}.safetensors"


def write_shard(
    path: str | os.PathLike[str], shard_index: int, layers: Sequence[EncodedLayer]
) -> tuple[Shard, list[Layer]]:
    """Writes one shard and returns what the index must say about it.

    shard_index: position of the shard in the index. Each layer becomes one extent.
    The file appears under `path` when it is complete and on the device; on an error (a full disk)
    the temporary file is removed and `path` is what it was.
    Raises NameRefused, DuplicateName, HeaderTooLarge, OSError.
    """
    path = Path(path)
    check_file_name(path.name)
    header = shard_header(layers)
    records: list[Layer] = []

    def write(file: BinaryIO) -> None:
        file.write(header)
        position = len(header)
        for layer in layers:
            hasher = BlockHasher()
            for piece in layer.pieces():
                file.write(piece)
                hasher.update(piece)
            extent = Extent(shard_index, position, layer.nbytes, hasher.finish())
            records.append(Layer(layer.name, layer.nbytes, (extent,), layer.tensors))
            position += layer.nbytes

    _write_atomically(path, write)
    nbytes = len(header) + sum(layer.nbytes for layer in layers)
    return Shard(path.name, nbytes), records


def write_index(pack_dir: str | os.PathLike[str], index: PackIndex) -> None:
    """Writes tierd.json. Until it is there the folder is not a pack, so it comes last."""
    text = index.to_json()
    _write_atomically(Path(pack_dir) / INDEX_FILE, lambda file: file.write(text))


def shard_header(layers: Iterable[_Placed], *, alignment: int = PAGE_BYTES) -> bytes:
    """Returns the header of a shard that holds `layers`, one after the other, and nothing else.

    It is padded to a multiple of `alignment`, itself a multiple of 4096.
    Raises DuplicateName, HeaderTooLarge.
    """
    return build_header(_entries(layers), {"format": "pt"}, alignment=alignment)


class BlockHasher:
    """The xxh3_64 of every 4 MiB block of an extent, from its bytes in order."""

    def __init__(self) -> None:
        self._hashes: list[int] = []
        self._hasher = xxhash.xxh3_64()
        self._room = BLOCK_BYTES

    def update(self, piece: memoryview) -> None:
        """Takes the next bytes; `piece` is one of bytes."""
        begin = 0
        while begin < piece.nbytes:
            part = piece[begin : begin + self._room]
            self._hasher.update(part)
            begin += part.nbytes
            self._room -= part.nbytes
            if self._room == 0:
                self._hashes.append(self._hasher.intdigest())
                self._hasher.reset()
                self._room = BLOCK_BYTES

    def finish(self) -> tuple[int, ...]:
        """Returns the hashes, the last of a short block where there is one."""
        if self._room < BLOCK_BYTES:
            self._hashes.append(self._hasher.intdigest())
            self._room = BLOCK_BYTES
        return tuple(self._hashes)


class _Placed(Protocol):
    """A layer whose arrays have their places: an EncodedLayer, or the index's Layer."""

    @property
    def tensors(self) -> tuple[Tensor, ...]: ...

    @property
    def nbytes(self) -> int: ...


def _entries(layers: Iterable[_Placed]) -> dict[str, Entry]:
    """Returns the header's entries: every array, and padding where safetensors allows no holes."""
    entries: dict[str, Entry] = {}
    base = 0
    paddings = 0

    def pad(begin: int, end: int) -> None:
        nonlocal paddings
        if begin < end:
            entries[f"{PADDING_PREFIX}{paddings}"] = Entry("U8", (end - begin,), begin, end)
            paddings += 1

    for layer in layers:
        position = base
        for stored in stored_arrays(layer.tensors):
            begin = base + stored.array.offset
            pad(position, begin)
            if stored.name in entries:
                raise DuplicateName(f"stored array {stored.name!r} appears twice in one shard")
            position = begin + stored.array.nbytes
            entries[stored.name] = Entry(stored.dtype, stored.shape, begin, position)
        base += layer.nbytes
        pad(position, base)
    return entries


def _write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(fd, "wb", buffering=1 << 20) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            # It is on the device: let go of the cache, so that a check afterwards reads the device.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)
