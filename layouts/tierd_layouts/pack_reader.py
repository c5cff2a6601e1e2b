"""A pack folder to an index that can be trusted.

The folder is held by descriptor and every file is opened beneath it without following links, so
neither a name in an index nor a folder that is replaced meanwhile can lead anywhere else.
"""

from __future__ import annotations

import errno
import os
import stat
from bisect import bisect_right
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING

from tierd_layouts.errors import (
    IndexMissing,
    IndexTooLarge,
    ShardDisagrees,
    ShardMissing,
    ShardSizeWrong,
)
from tierd_layouts.index import PackIndex
from tierd_layouts.index_json import MAX_INDEX_BYTES
from tierd_layouts.names import PADDING_PREFIX, check_file_name
from tierd_layouts.records import INDEX_FILE
from tierd_layouts.safetensors_file import read_header
from tierd_layouts.stored import stored_arrays

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd_layouts.records import Shard
    from tierd_layouts.safetensors_file import Header

#: NONBLOCK: a FIFO under a shard's name must not hang its reader; files ignore it.
_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

Folder = int | str | os.PathLike[str]


@contextmanager
def pack_folder(pack: Folder) -> Iterator[int]:
    """Gives a descriptor of the folder; one that was passed in stays open."""
    if isinstance(pack, int):
        yield pack
        return
    try:
        fd = os.open(pack, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IndexMissing(f"{os.fspath(pack)}: not a pack: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def open_pack(pack: Folder, *, where: str | None = None) -> PackIndex:
    """Returns the index of a pack whose shards exist, have the right sizes and agree with it.

    Reads tierd.json and the headers of the shards, not their data: see `layer_reader.verify_layer`.
    where: how errors name the pack. Raises a FormatError subclass; OSError from the system.
    """
    where = where or (f"descriptor {pack}" if isinstance(pack, int) else os.fspath(pack))
    with pack_folder(pack) as folder:
        index = PackIndex.parse(_read_index(folder, where), where=f"{where}/{INDEX_FILE}")
        for shard, places in zip(index.shards, _places_by_shard(index), strict=True):
            fd = open_shard(folder, shard, where=where)
            try:
                header = read_header(fd, where=f"{where}/{shard.file}")
            finally:
                os.close(fd)
            _check_agreement(places, header, f"{where}/{shard.file}")
    return index


def open_shard(folder: int, shard: Shard, *, where: str, flags: int = 0) -> int:
    """Returns a read-only descriptor of a shard with the right size; `flags` may add O_DIRECT.

    Raises NameRefused, ShardMissing, ShardSizeWrong; OSError from the system.
    """
    check_file_name(shard.file)
    label = f"{where}/{shard.file}"
    fd = _open_plain(folder, shard.file, label, ShardMissing, flags)
    try:
        found = os.fstat(fd).st_size
        if found != shard.nbytes:
            raise ShardSizeWrong(f"{label}: {found} bytes, the index says {shard.nbytes}")
    except BaseException:
        os.close(fd)
        raise
    return fd


# --------------------------------------------------------------------------------------------------


def _open_plain(
    folder: int, name: str, label: str, error_type: type[IndexMissing | ShardMissing], flags: int
) -> int:
    try:
        fd = os.open(name, _OPEN_FLAGS | flags, dir_fd=folder)
    except FileNotFoundError as error:
        raise error_type(f"{label}: there is no such file") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise error_type(f"{label}: a link is not followed") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise error_type(f"{label}: not a plain file")
    return fd


def _read_index(folder: int, where: str) -> bytes:
    label = f"{where}/{INDEX_FILE}"
    fd = _open_plain(folder, INDEX_FILE, label, IndexMissing, 0)
    with os.fdopen(fd, "rb") as file:
        nbytes = os.fstat(fd).st_size
        if nbytes > MAX_INDEX_BYTES:
            raise IndexTooLarge(f"{label}: {nbytes} bytes, the limit is {MAX_INDEX_BYTES}")
        return file.read(MAX_INDEX_BYTES + 1)


_Place = tuple[str, tuple[int, ...], int]  # stored dtype, stored shape, offset in the shard file


def _places_by_shard(index: PackIndex) -> list[dict[str, _Place]]:
    """Returns for every shard where the index says that its arrays are, by stored name."""
    places: list[dict[str, _Place]] = [{} for _ in index.shards]
    for layer in index.layers:
        ends = list(accumulate(extent.nbytes for extent in layer.extents))
        for stored in stored_arrays(layer):
            # An empty array may lie at the very end, where no extent begins any more.
            number = min(bisect_right(ends, stored.array.offset), len(ends) - 1)
            extent = layer.extents[number]
            offset = extent.offset + stored.array.offset - (ends[number] - extent.nbytes)
            places[extent.shard][stored.name] = (stored.dtype, stored.shape, offset)
    return places


def _check_agreement(expected: dict[str, _Place], header: Header, where: str) -> None:
    """Raises ShardDisagrees unless the header holds exactly the expected arrays, and padding."""
    for name, entry in header.entries.items():
        found = (entry.dtype, entry.shape, header.data_start + entry.begin)
        wanted = expected.pop(name, None)
        if wanted is None:
            if not name.startswith(PADDING_PREFIX) or entry.dtype != "U8":
                raise ShardDisagrees(f"{where}: {name!r} is not in the index, and not padding")
        elif found != wanted:
            raise ShardDisagrees(
                f"{where}: {name!r} is {found[0]}{list(found[1])} at {found[2]}, the index says "
                f"{wanted[0]}{list(wanted[1])} at {wanted[2]}"
            )
    if expected:
        raise ShardDisagrees(f"{where}: {min(expected)!r} is in the index, but not in the header")
