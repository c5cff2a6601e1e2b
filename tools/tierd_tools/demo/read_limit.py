"""A limit on what a group of processes reads from a device, set by the kernel (blkio or io cgroup).

It holds for whatever way the bytes are read: page faults, read-ahead, read(2) or O_DIRECT.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tierd_tools.demo import memory_cap
from tierd_tools.demo.memory_cap import CapUnavailable, MemoryCap

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATIENCE_SECONDS = 5.0


def disk_of(path: Path) -> str:
    """MAJOR:MINOR of the whole disk below `path`; limits are not set on partitions.

    Raises CapUnavailable where no disk is below it (tmpfs, overlay).
    """
    device = path.stat().st_dev
    entry = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    if not entry.exists():
        raise CapUnavailable(f"{path} is not on a block device")
    entry = entry.resolve()
    disk = entry.parent if (entry / "partition").exists() else entry
    return (disk / "dev").read_text().strip()


@contextlib.contextmanager
def limited_reads(group: MemoryCap, path: Path, bytes_per_second: int) -> Iterator[None]:
    """What `group.command` starts from here on reads from the disk below `path` this fast at most.

    Raises CapUnavailable with what was tried.
    """
    disk = disk_of(path)
    if group.version == 2:
        _write(group.folder.parent / "cgroup.subtree_control", "+io")
        _write(group.folder / "io.max", f"{disk} rbps={bytes_per_second}")
        yield
        return
    folder = memory_cap.CGROUP_ROOT / "blkio" / group.folder.name
    try:
        folder.mkdir()
    except OSError as error:
        raise CapUnavailable(f"{folder}: {error.strerror}") from error
    try:
        _write(folder / "blkio.throttle.read_bps_device", f"{disk} {bytes_per_second}")
        group.joined.append(folder)
        try:
            yield
        finally:
            group.joined.remove(folder)
    finally:
        _remove(folder)


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text)
    except OSError as error:
        raise CapUnavailable(f"{file} does not take {text!r}: {error.strerror}") from error


def _remove(folder: Path) -> None:
    """The kernel needs a moment after the last exit."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            folder.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
