"""One block of a layer: read it from its shard straight to its place, and verify it there."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import dataclass

import xxhash

from tierd.errors import ChecksumMismatch, ReadError
from tierd_layouts.records import PAGE_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """`target.nbytes` at `offset` of the file behind `fd`; the rest is for errors to name."""

    fd: int
    offset: int
    target: memoryview
    xxh3: int
    pack: str
    layer: str
    file: str
    index: int  #: this is block `index` of `count` of its extent
    count: int

    @property
    def name(self) -> str:
        return f"pack {self.pack!r}, layer {self.layer!r}: {self.file}"


@dataclass(frozen=True, slots=True)
class BlockRead:
    direct: bool  #: whether it went around the page cache
    fell_back: bool = False  #: whether the file refused O_DIRECT just now


def read_block(block: Block) -> BlockRead:
    """Fill and verify the block's target. Blocks; releases the GIL while reading and hashing.

    A file system that opens with O_DIRECT but refuses to read with it (EINVAL) is read through the
    page cache from then on, and nothing is left there.
    Raises ReadError (system error, file too short) and ChecksumMismatch.
    """
    try:
        outcome = _read(block)
    except ReadError:
        raise
    except OSError as error:
        number = error.errno or 0
        raise ReadError(
            f"{block.name} cannot be read: {errno.errorcode.get(number, number)} "
            f"({os.strerror(number)}), {block.target.nbytes} bytes at offset {block.offset}"
        ) from None
    _verify(block)
    return outcome


def _read(block: Block) -> BlockRead:
    flags = fcntl.fcntl(block.fd, fcntl.F_GETFL)
    direct = bool(flags & os.O_DIRECT)
    outcome = BlockRead(direct)
    try:
        _fill(block)
    except OSError as error:
        if not (direct and error.errno == errno.EINVAL):
            raise
        # Of the open file, so for all threads that read it.
        fcntl.fcntl(block.fd, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        outcome = BlockRead(direct=False, fell_back=True)
        _fill(block)
    if not outcome.direct:
        os.posix_fadvise(block.fd, block.offset, block.target.nbytes, os.POSIX_FADV_DONTNEED)
    return outcome


def _fill(block: Block) -> None:
    """Read until the target is full. A short read in the middle of a file is legal; direct reads
    go on at the last page boundary, and a file without one more page has ended."""
    wanted = block.target.nbytes
    done = 0
    while done < wanted:
        got = os.preadv(block.fd, [block.target[done:]], block.offset + done)
        if done + got == wanted:
            return
        pages = got - got % PAGE_BYTES
        if pages == 0:
            raise ReadError(
                f"{block.name} ends early: expected {wanted} bytes at offset {block.offset}, "
                f"got {done + got}"
            )
        done += pages


def _verify(block: Block) -> None:
    found = xxhash.xxh3_64_intdigest(block.target)
    if found != block.xxh3:
        raise ChecksumMismatch(
            f"{block.name} is corrupt: block {block.index} of {block.count} "
            f"({block.target.nbytes} bytes at offset {block.offset}) "
            f"has xxh3 {found:016x}, expected {block.xxh3:016x}"
        )
