"""A memory cgroup (v1 or v2) around a group of processes: the cap, and what the group holds.

Anonymous memory and shmem are what a process group cannot give back; the page cache it can. Both
are charged to the cap, and both are reported, apart.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self

CGROUP_ROOT = Path("/sys/fs/cgroup")
SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest samples seen, in bytes."""

    memory_bytes: int  #: anonymous + shmem
    page_cache_bytes: int


class CapUnavailable(OSError):
    """No memory cgroup can be written here; the text says what was tried."""


class MemoryCap:
    """A cgroup with a limit; commands join it before they start. Use as a context manager."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.folder, self.version = _create(name)
        try:
            _limit(self.folder, self.version, limit_bytes)
        except OSError as error:
            self.folder.rmdir()
            raise CapUnavailable(f"{self.folder} takes no limit: {error}") from error
        #: groups that commands join; with cgroup v1 there may be others, of other controllers
        self.joined = [self.folder]
        self._peak_memory = self._peak_cache = 0
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="memory-cap", daemon=True)

    def __enter__(self) -> Self:
        self._sampler.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._sampler.join()
        for _ in range(100):  # the kernel needs a moment after the last exit
            try:
                self.folder.rmdir()
                return
            except OSError:
                threading.Event().wait(0.05)
        self.folder.rmdir()

    def command(self, argv: list[str]) -> list[str]:
        """`argv`, started inside the group."""
        join = 'echo $$ > "$0" && exec "$@"'
        for folder in self.joined:
            argv = ["/bin/sh", "-c", join, str(folder / "cgroup.procs"), *argv]
        return argv

    def peak(self) -> Peak:
        return Peak(self._peak_memory, self._peak_cache)

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            memory, cache = self._usage()
            self._peak_memory = max(self._peak_memory, memory)
            self._peak_cache = max(self._peak_cache, cache)

    def _usage(self) -> tuple[int, int]:
        text = (self.folder / "memory.stat").read_text()
        stat = {key: int(value) for key, value in (line.split() for line in text.splitlines())}
        if self.version == 1:
            shmem = stat["total_shmem"]
            return stat["total_rss"] + shmem, stat["total_cache"] - shmem
        return stat["anon"] + stat["shmem"], stat["file"] - stat["shmem"]


def _limit(folder: Path, version: int, limit_bytes: int) -> None:
    limit = "memory.limit_in_bytes" if version == 1 else "memory.max"
    (folder / limit).write_text(str(limit_bytes))
    swap = folder / "memory.swap.max"
    if version == 2 and swap.exists():  # absent where the kernel does not account swap
        swap.write_text("0")


def _create(name: str) -> tuple[Path, int]:
    """A new empty group and its cgroup version. Raises CapUnavailable."""
    tried = []
    for version, parent in ((1, CGROUP_ROOT / "memory"), (2, CGROUP_ROOT)):
        marker = "memory.limit_in_bytes" if version == 1 else "cgroup.controllers"
        if not (parent / marker).exists():
            tried.append(f"no cgroup v{version} memory controller at {parent}")
            continue
        if version == 2 and "memory" not in (parent / marker).read_text().split():
            tried.append(f"{parent} has no memory controller")
            continue
        folder = parent / f"{name}-{os.getpid()}"
        try:
            if version == 2:
                (parent / "cgroup.subtree_control").write_text("+memory")
            folder.mkdir()
        except OSError as error:
            tried.append(f"{folder}: {error.strerror}")
            continue
        return folder, version
    raise CapUnavailable("; ".join(tried))
