"""One chunk of a layer: read it from its shard straight to its place, and verify it there.

A chunk is one or more of the blocks that the hashes are of: fewer, larger reads cost less.
"""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xxhash

from tierd.errors import ChecksumMismatch, ReadError
from tierd_layouts.records import BLOCK_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """`target.nbytes` at `offset` of the file behind `fd`; the rest is for errors to name."""

    fd: int
    offset: int
    target: memoryview
    start: int  #: of the target, in the layer
    xxh3: tuple[int, ...]  #: one for each block; only an extent's last block may be shorter
    pack: str
    layer: str
    file: str
    index: int  #: the first of these blocks is number `index` of `count` of its extent
    count: int

    @property
    def name(self) -> str:
        return f"pack {self.pack!r}, layer {self.layer!r}: {self.file}"


@dataclass(frozen=True, slots=True)
class ChunkRead:
    direct: bool  #: whether it went around the page cache
    fell_back: bool = False  #: whether the file refused O_DIRECT just now


def read_chunk(chunk: Chunk, piece_bytes: int) -> ChunkRead:
    """Fill the chunk's target. Blocks without the GIL.

    piece_bytes: the most that one call to the system asks for, a multiple of 4 KiB.
    A file system that opens with O_DIRECT but refuses to read with it (EINVAL) is read through the
    page cache from then on, and nothing is left there. Raises ReadError (system error, file too
    short).
    """
    try:
        return _read(chunk, piece_bytes)
    except ReadError:
        raise
    except OSError as error:
        number = error.errno or 0
        raise ReadError(
            f"{chunk.name} cannot be read: {errno.errorcode.get(number, number)} "
            f"({os.strerror(number)}), {chunk.target.nbytes} bytes at offset {chunk.offset}"
        ) from None


def verify_chunk(chunk: Chunk, announce: Callable[[int, int], None]) -> None:
    """Hash what was read, without the GIL. Each block that is right is announced by its place in
    the layer and its size. Raises ChecksumMismatch."""
    for number, expected in enumerate(chunk.xxh3):
        start = number * BLOCK_BYTES
        block = chunk.target[start : start + BLOCK_BYTES]
        found = xxhash.xxh3_64_intdigest(block)
        if found != expected:
            raise ChecksumMismatch(
                f"{chunk.name} is corrupt: block {chunk.index + number} of {chunk.count} "
                f"({block.nbytes} bytes at offset {chunk.offset + start}) "
                f"has xxh3 {found:016x}, expected {expected:016x}"
            )
        announce(chunk.start + start, block.nbytes)


def _read(chunk: Chunk, piece_bytes: int) -> ChunkRead:
    flags = fcntl.fcntl(chunk.fd, fcntl.F_GETFL)
    direct = bool(flags & os.O_DIRECT)
    outcome = ChunkRead(direct)
    try:
        _fill(chunk, piece_bytes)
    except OSError as error:
        if not (direct and error.errno == errno.EINVAL):
            raise
        # Of the open file, so for all threads that read it.
        fcntl.fcntl(chunk.fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        outcome = ChunkRead(direct=False, fell_back=True)
        _fill(chunk, piece_bytes)
    if not outcome.direct:
        os.posix_fadvise(chunk.fd, chunk.offset, chunk.target.nbytes, os.POSIX_FADV_DONTNEED)
    return outcome


def _fill(chunk: Chunk, piece_bytes: int) -> None:
    """Read until the target is full. A short read in the middle of a file is legal; direct reads
    go on at the last page boundary, and a file without one more page has ended."""
    wanted = chunk.target.nbytes
    done = 0
    while done < wanted:
        end = min(wanted, done + piece_bytes)
        got = os.preadv(chunk.fd, [chunk.target[done:end]], chunk.offset + done)
        if done + got < end:
            pages = got - got % PAGE_BYTES
            if pages == 0:
                raise ReadError(
                    f"{chunk.name} ends early: expected {wanted} bytes at offset {chunk.offset}, "
                    f"got {done + got}"
                )
            done += pages
        else:
            done = end
