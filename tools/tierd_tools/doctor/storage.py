"""Can packs be read around the page cache, from where they lie?"""

from __future__ import annotations

import errno
import mmap
import os
from typing import TYPE_CHECKING

from tierd_layouts.records import INDEX_FILE, PAGE_BYTES
from tierd_tools.doctor.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_SHARDS = "*.safetensors"


def findings(directories: Sequence[Path]) -> Iterator[Finding]:
    """directories: packs, or directories of packs. Nothing is written."""
    if not directories:
        yield Finding(
            "O_DIRECT", "unknown", "no directory of packs was named, and no daemon says which",
            "tierctl doctor --packs DIR",
        )  # fmt: skip
    for directory in directories:
        yield direct_reads(directory)


def direct_reads(directory: Path) -> Finding:
    name = f"O_DIRECT in {directory}"
    if not directory.is_dir():
        return Finding(
            name, "does not work", "is not a directory", "name the right one", needed=True
        )
    try:
        shard = next(_shards(directory), None)
    except OSError as error:
        return Finding(
            name, "does not work", f"cannot be listed: {error.strerror}",
            "let the user of the daemon read it", needed=True,
        )  # fmt: skip
    if shard is None:
        return Finding(
            name, "unknown", "holds no pack to try it on", "tierctl pack MODEL DIR, then again"
        )
    try:
        got = _read_directly(shard)
    except OSError as error:
        if error.errno != errno.EINVAL:
            return Finding(
                name, "does not work", f"{shard}: {error.strerror}",
                "let the user of the daemon read it", needed=True,
            )  # fmt: skip
        return Finding(
            name, "does not work", f"{shard}: its file system refuses O_DIRECT",
            "keep packs on ext4 or xfs: tierd reads them through the page cache meanwhile, at "
            "several times the CPU, and the cache takes memory beside the budget",
        )  # fmt: skip
    return Finding(name, "works", f"{got} bytes of {shard.name} around the page cache")


def _shards(directory: Path) -> Iterator[Path]:
    packs = [directory] if (directory / INDEX_FILE).is_file() else sorted(directory.iterdir())
    for pack in packs:
        if (pack / INDEX_FILE).is_file():
            yield from (file for file in pack.glob(_SHARDS) if file.stat().st_size >= PAGE_BYTES)


def _read_directly(shard: Path) -> int:
    fd = os.open(shard, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE_BYTES) as memory:
            return os.preadv(fd, [memory], 0)
    finally:
        os.close(fd)
