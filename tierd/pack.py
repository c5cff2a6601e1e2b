"""One version of one pack, opened: its index, its shards, its control files and its readers."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.access import AccessGroup
from tierd.errors import PackInvalid
from tierd_layouts import slot_entries
from tierd_layouts.errors import LayoutsError
from tierd_layouts.index import INDEX_FILE, PackIndex
from tierd_layouts.names import check_model_name
from tierd_layouts.pack_reader import open_pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

#: What a client needs to build the model: the index, and what transformers looks for beside it.
CONTROL_FILES = (
    INDEX_FILE,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
)

# Inside a pack no name may lead elsewhere, and a FIFO must not block the reader.
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class Identity:
    """What changes when a pack is replaced: its files (device, inode, size, mtime) and readers."""

    access: AccessGroup
    files: tuple[tuple[int, int, int, int], ...]


@dataclass(slots=True, eq=False)
class Pack:
    """An opened pack. It keeps its files open, so that it can be read on after it was replaced or
    removed from the disk; `close` ends that."""

    name: str
    path: Path
    root: Path  #: the directory whose listing showed it, or the pack itself
    identity: Identity
    index: PackIndex
    files: dict[str, int]  #: control file -> descriptor
    shards: tuple[int, ...]  #: descriptors in the order of `index.shards`
    keys: tuple[bytes, ...]  #: the slot table's key of each layer
    model: int = 0  #: id in the core, given when it is served
    arena: int = 0
    users: set[int] = field(default_factory=set)  #: clients that have it open
    reads: int = 0  #: in flight
    state: str = "served"
    closed: bool = False

    @property
    def access(self) -> AccessGroup:
        return self.identity.access

    @property
    def device(self) -> int:
        """What its shards are read from: packs of one device share what it gives."""
        return self.identity.files[-1][0]

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            for fd in (*self.files.values(), *self.shards):
                os.close(fd)

    @contextlib.contextmanager
    def client_files(self) -> Iterator[list[int]]:
        """Read-only descriptors of `files`, with file offsets of their own; closed on leaving."""
        with contextlib.ExitStack() as undo:
            opened: list[int] = []
            for fd in self.files.values():
                again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
                undo.callback(os.close, again)
                opened.append(again)
            yield opened


def identify(path: Path) -> Identity:
    """The identity of the pack at `path`, without reading it. Raises OSError."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _identity(directory)
    finally:
        os.close(directory)


def load(name: str, path: Path, root: Path) -> Pack:
    """Open and check a pack. Blocks on the disk. Raises PackInvalid, which names pack and fault."""
    try:
        check_model_name(name)
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return _load(name, path, root, directory)
        finally:
            os.close(directory)
    except (LayoutsError, OSError) as error:
        raise PackInvalid(f"pack {name!r}: {error}") from error


def _load(name: str, path: Path, root: Path, directory: int) -> Pack:
    with contextlib.ExitStack() as undo:

        def opened(file: str, flags: int = _OPEN) -> int:
            fd = os.open(file, flags, dir_fd=directory)
            undo.callback(os.close, fd)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise PackInvalid(f"pack {name!r} in {path}: {file} is no ordinary file")
            return fd

        identity = _identity(directory)
        index = open_pack(directory, where=str(path))
        files: dict[str, int] = {}
        for file in CONTROL_FILES:
            with contextlib.suppress(FileNotFoundError):
                files[file] = opened(file)
        shards = [_direct(opened, shard.file) for shard in index.shards]
        found = tuple(_file(os.fstat(fd)) for fd in (files[INDEX_FILE], *shards))
        if not set(found) <= set(identity.files) or _identity(directory) != identity:
            raise PackInvalid(f"pack {name!r} in {path} changed while it was read: reload again")
        undo.pop_all()
    keys = tuple(slot_entries.slot_key(index.digest, layer.name) for layer in index.layers)
    return Pack(name, path, root, identity, index, files, tuple(shards), keys)


def _direct(opened: Callable[[str, int], int], file: str) -> int:
    """Open a shard to be read around the page cache, where its file system can do that. (The
    readers find out too, and `tierctl status` says so.)"""
    try:
        return opened(file, _OPEN | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return opened(file, _OPEN)


def _identity(directory: int) -> Identity:
    index = os.stat(INDEX_FILE, dir_fd=directory, follow_symlinks=False)
    shards = sorted(
        entry.name for entry in os.scandir(directory) if entry.name.endswith(".safetensors")
    )
    files = [index]
    files += [os.stat(name, dir_fd=directory, follow_symlinks=False) for name in shards]
    return Identity(AccessGroup.of(index), tuple(_file(status) for status in files))


def _file(status: os.stat_result) -> tuple[int, int, int, int]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
