"""Bytes that a block device has read, as the kernel counts them."""

from __future__ import annotations

import os
from pathlib import Path

SECTOR_BYTES = 512


def stat_file(path: Path) -> Path | None:
    """The kernel's statistics of the device below `path`; None where there is none (tmpfs)."""
    device = path.stat().st_dev
    file = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat")
    return file if file.exists() else None


def read_bytes(file: Path) -> int:
    """Bytes read since boot: the third field counts sectors."""
    return int(file.read_text().split()[2]) * SECTOR_BYTES


def drop_from_page_cache(folder: Path) -> None:
    """Write back and forget every page of the files below `folder`."""
    os.sync()
    forget_pages(folder)


def forget_pages(folder: Path) -> None:
    """As `drop_from_page_cache`, of files that were written back already."""
    for file in folder.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
