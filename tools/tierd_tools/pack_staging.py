"""A directory that appears whole or not at all.

The work happens in a hidden sibling of the target, `.NAME.SUFFIX`, under a lock that the kernel
drops when its holder dies. Publishing is one rename; a directory that is there already is exchanged
with the new one in one step, so readers see the old or the new content and nothing between.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tierd_tools.errors import (
    DiskFull,
    PackError,
    TargetBusy,
    TargetRefused,
    TargetUnwritable,
    ToolError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
_UNWRITABLE = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))


@dataclass(frozen=True, slots=True)
class Staging:
    """The hidden directory `path` that becomes `target`."""

    path: Path
    target: Path

    @classmethod
    @contextmanager
    def locked(cls, target: Path, suffix: str) -> Iterator[Staging]:
        """The staging directory of `target`, with what an interrupted run left in it.

        Raises TargetBusy while another process works on the same target.
        """
        target = Path(os.path.realpath(target))
        staging = cls(target.parent / f".{target.name}.{suffix}", target)
        lock = target.parent / f".{target.name}.tierd-lock"
        with refusals(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(lock, target)
        try:
            with refusals(target):
                staging.path.mkdir(exist_ok=True)
            yield staging
        finally:
            if not any_entry(staging.path):
                shutil.rmtree(staging.path, ignore_errors=True)
            lock.unlink(missing_ok=True)
            os.close(descriptor)

    def clear(self) -> None:
        """Removes everything in the staging directory."""
        with refusals(self.target):
            shutil.rmtree(self.path)
            self.path.mkdir()

    def free_bytes(self) -> int:
        """What an ordinary user may still write to this file system."""
        stat = os.statvfs(self.path)
        return stat.f_bavail * stat.f_frsize

    def publish(self, *, replace: bool) -> None:
        """Renames the staging directory to the target.

        replace: a directory that is there is exchanged with the new one in the same instant and is
        then at `path`. Otherwise only an empty directory may be there.
        Raises PackError when the file system cannot exchange two directories.
        """
        with refusals(self.target):
            fsync_directory(self.path)
            if replace and any_entry(self.target):
                _exchange(self.path, self.target)
            else:
                self.path.rename(self.target)
            fsync_directory(self.target.parent)

    def remove(self) -> None:
        """Removes the staging directory with what is in it, if it is still there."""
        with refusals(self.path):
            if self.path.exists():
                shutil.rmtree(self.path)


def adopt_access(new: Path, old: Path, marker: str) -> None:
    """Gives `new` and its files the mode and owner of `old` and of its `marker` file.

    An operator who restricted a pack wants its successor as restricted.
    """
    model = (old / marker).stat()
    for path, wanted in ((new, old.stat()), *((file, model) for file in new.iterdir())):
        found = path.stat()
        if (found.st_uid, found.st_gid) != (wanted.st_uid, wanted.st_gid):
            os.chown(path, wanted.st_uid, wanted.st_gid)
        path.chmod(wanted.st_mode & 0o7777)


def refuse_unless_replaceable(target: Path, marker: str) -> None:
    """Raises TargetRefused when `target` is neither absent, nor empty, nor a pack and only that.

    A pack holds plain files; a directory in it is somebody's who would miss it.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise TargetRefused(f"{target} exists and is not a directory")
    with refusals(target), os.scandir(target) as entries:
        found = {entry.name: entry.is_dir() for entry in entries}
    if not found:
        return
    if marker not in found:
        raise TargetRefused(
            f"{target} exists and is not a pack (no {marker}, {len(found)} other entries): "
            "choose another name or remove it"
        )
    directories = sorted(name for name, is_directory in found.items() if is_directory)
    if directories:
        raise TargetRefused(
            f"{target} is a pack that also holds directories ({', '.join(directories[:3])}), "
            "which replacing it would delete: move them away"
        )


def any_entry(path: Path) -> bool:
    """Whether `path` is a directory with something in it."""
    if not path.is_dir():
        return False
    with os.scandir(path) as entries:
        return next(entries, None) is not None


@contextmanager
def refusals(target: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turns an OSError of writing `target` into a PackError that says what is wrong with it."""
    try:
        yield
    except ToolError:
        raise
    except OSError as error:
        where = error.filename or target
        if error.errno in _FULL:
            raise DiskFull(_full(target, needed_bytes)) from error
        if error.errno in _UNWRITABLE:
            raise TargetUnwritable(f"cannot write {where}: {error.strerror}") from error
        raise PackError(f"writing {where}: {error.strerror or error}") from error


def size_text(nbytes: int) -> str:
    """`1.50 GiB`, `12.0 MiB`, `812 bytes`."""
    if nbytes >= 1 << 30:
        return f"{nbytes / (1 << 30):,.2f} GiB"
    return f"{nbytes / (1 << 20):,.1f} MiB" if nbytes >= 1 << 20 else f"{nbytes} bytes"


def copy_file(source: Path, target: Path) -> None:
    """Copies the content and makes it durable. Not the permissions: the pack's reader decides."""
    shutil.copyfile(source, target)
    fsync_file(target)


def write_file(target: Path, content: bytes) -> None:
    """Writes a small file whole: temporary name, fsync, rename."""
    temporary = target.with_name(target.name + ".tmp")
    try:
        temporary.write_bytes(content)
        fsync_file(temporary)
        temporary.rename(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(target.parent)


def fsync_file(path: Path) -> None:
    _fsync(path, os.O_RDONLY)


def fsync_directory(path: Path) -> None:
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _full(target: Path, needed_bytes: int | None) -> str:
    stat = os.statvfs(target.parent)
    free = size_text(stat.f_bavail * stat.f_frsize)
    needed = "" if needed_bytes is None else f"needs about {size_text(needed_bytes)}, "
    return f"{target}: file system full: {needed}{free} free"


def _lock(lock: Path, target: Path) -> int:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(lock, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have unlinked the file between our open and our lock.
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
                return descriptor
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode(errors="replace") or "unknown"
            os.close(descriptor)
            raise TargetBusy(
                f"{target} is being written by another process (pid {holder})"
            ) from error
        except OSError:
            lock.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        renameat2 = libc.renameat2
    except AttributeError as error:
        raise PackError(f"cannot replace {old} in one step: no renameat2 in libc") from error
    if renameat2(_AT_FDCWD, bytes(new), _AT_FDCWD, bytes(old), _RENAME_EXCHANGE) == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        raise PackError(
            f"cannot replace {old} in one step: this file system cannot exchange two directories; "
            "remove the old one and run again (finished work is kept)"
        )
    raise OSError(number, os.strerror(number), str(old))
