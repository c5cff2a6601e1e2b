"""A shard that grows tensor by tensor: nothing of it is held in memory.

The header comes first in the file and is known last, so room is left for the largest one that is
possible. Until it is finished the shard has a temporary name; its finished layers may be used
again by who knows where they end.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from tierd_layouts.codecs import ARRAYS_OF_CODEC
from tierd_layouts.container import shard_file_name
from tierd_layouts.records import (
    ARRAY_ALIGNMENT,
    PAGE_BYTES,
    Array,
    Extent,
    Layer,
    Shard,
    Tensor,
    stored_name,
)
from tierd_layouts.safetensors_file import Entry, build_header
from tierd_layouts.shard_writer import TEMPORARY_SUFFIX, BlockHasher, shard_header
from tierd_layouts.tensor_rules import check_tensor
from tierd_layouts.tile_grid import TILE
from tierd_tools.pack_staging import fsync_directory

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path
    from types import TracebackType

    from tierd_tools.pack_plan import PlannedLayer
    from tierd_tools.pack_tensor import EncodedTensor

_ZEROS = memoryview(bytes(PAGE_BYTES))
_WRITE_BYTES = 64 << 20  # Linux writes less than 2 GiB at once
#: so much is on its way to the device before it is asked for at the end of a layer
_WRITEBACK_BYTES = 32 << 20
_MANY = 10**15  #: no number in a header is longer


class ShardWriter:
    """Shard `number` of a pack in `directory`; `layers`: those that are in its file already."""

    def __init__(
        self, directory: Path, number: int, header_bytes: int, layers: Iterable[Layer] = ()
    ) -> None:
        self._path = directory / shard_file_name(number)
        self._number = number
        self._header_bytes = header_bytes
        self._layers = list(layers)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(temporary_path(directory, number), flags, 0o666)
        self._end = end_of(self._layers, header_bytes)
        self._flushed = self._end
        os.ftruncate(self._fd, self._end)
        self._name = ""
        self._tensors: list[Tensor] = []
        self._begin = 0
        self._hasher = BlockHasher()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)

    def begin_layer(self, name: str) -> None:
        """The tensors that follow belong to layer `name`."""
        self._name = name
        self._tensors = []
        self._begin = self._end
        self._hasher = BlockHasher()

    def add(self, encoded: EncodedTensor) -> None:
        """Writes a tensor. Raises FormatError for one that no index can hold, OSError."""
        arrays: dict[str, Array] = {}
        for name, pieces in encoded.arrays.items():
            self._pad(ARRAY_ALIGNMENT)
            offset = self._end - self._begin
            for piece in pieces:
                self._write(piece.cast("B") if piece.nbytes else piece)
            arrays[name] = Array(offset, self._end - self._begin - offset)
        tensor = Tensor(
            name=encoded.name,
            shape=encoded.shape,
            dtype=encoded.dtype,
            codec=encoded.codec,
            order="row-major",
            tile=None if encoded.codec == "dense" else (TILE, TILE),
            nnz=encoded.nnz,
            arrays=arrays,
            source=encoded.name,
            group=encoded.group,
        )
        check_tensor(tensor, f"layer {self._name!r}")
        self._tensors.append(tensor)

    def end_layer(self) -> Layer:
        """What the index says of the layer. It is not durable before `sync`."""
        self._pad(PAGE_BYTES)
        if self._end == self._begin:  # a layer of empty tensors
            self._write(_ZEROS)
        nbytes = self._end - self._begin
        extent = Extent(self._number, self._begin, nbytes, self._hasher.finish())
        layer = Layer(self._name, nbytes, (extent,), tuple(self._tensors))
        self._layers.append(layer)
        return layer

    def sync(self) -> None:
        """Makes all layers durable that have ended. May be called in another thread."""
        os.fdatasync(self._fd)
        # Out of the cache: nobody reads it soon, and a check afterwards reads the device.
        os.posix_fadvise(self._fd, 0, self._end, os.POSIX_FADV_DONTNEED)

    def finish(self) -> Shard:
        """Writes the header and gives the shard its name. Raises DuplicateName, OSError."""
        header = shard_header(self._layers, alignment=self._header_bytes)
        if len(header) != self._header_bytes:
            raise AssertionError(f"{len(header)} bytes of header, reserved: {self._header_bytes}")
        _write_all(self._fd, memoryview(header), 0)
        self.sync()
        os.rename(self._path.with_name(self._path.name + TEMPORARY_SUFFIX), self._path)
        fsync_directory(self._path.parent)
        return Shard(self._path.name, self._end)

    def _pad(self, alignment: int) -> None:
        # A layer begins on a page, so what is aligned in the file is aligned in the layer.
        self._write(_ZEROS[: -self._end % alignment])

    def _write(self, piece: memoryview) -> None:
        _write_all(self._fd, piece, self._end)
        self._hasher.update(piece)
        self._end += piece.nbytes
        if self._end - self._flushed >= _WRITEBACK_BYTES:
            # Of dirty pages this starts the writing, and does not wait for it.
            span = self._end - self._flushed
            os.posix_fadvise(self._fd, self._flushed, span, os.POSIX_FADV_DONTNEED)
            self._flushed = self._end


def temporary_path(directory: Path, number: int) -> Path:
    """Where shard `number` is until it is finished."""
    return directory / (shard_file_name(number) + TEMPORARY_SUFFIX)


def end_of(layers: Sequence[Layer], header_bytes: int) -> int:
    """Where the last of `layers`, the first ones of a shard, ends in its file."""
    if not layers:
        return header_bytes
    extent = layers[-1].extents[-1]
    return extent.offset + extent.nbytes


def reserved_header_bytes(layers: Iterable[PlannedLayer]) -> int:
    """How long the header of a shard of these layers can be, whatever codecs are chosen."""
    entries: dict[str, Entry] = {}

    def add(name: str, dtype: str, shape: tuple[int, ...]) -> None:
        entries[name] = Entry(dtype, shape, _MANY, _MANY)
        entries[f"__pad__.{_MANY + len(entries)}"] = Entry("U8", (_MANY,), _MANY, _MANY)

    every = sorted({name for names in ARRAYS_OF_CODEC.values() for name in names} - {"data"})
    for layer in layers:
        for tensor in layer.tensors:
            name = tensor.source.name
            add(name, tensor.source.dtype, tensor.source.shape)
            if tensor.codec != "dense":
                for array in every:
                    add(stored_name(name, array), "U64", (_MANY,))
        entries[f"__pad__.{_MANY + len(entries)}"] = Entry("U8", (_MANY,), _MANY, _MANY)
    return len(build_header(entries, {"format": "pt"}))


def _write_all(fd: int, piece: memoryview, offset: int) -> None:
    done = 0
    while done < piece.nbytes:
        done += os.pwrite(fd, piece[done : done + _WRITE_BYTES], offset + done)
