"""What a process takes of the machine, as the kernel counts it and not as the process says."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class Footprint:
    """fds: how many descriptors of each kind; shared_bytes: memory behind its memfds, by name;
    threads; anonymous_bytes: memory of its own."""

    fds: Counter[str]
    shared_bytes: Counter[str]
    threads: int
    anonymous_bytes: int

    @classmethod
    def of(cls, pid: int) -> Footprint:
        fds: Counter[str] = Counter()
        files: dict[tuple[int, int], tuple[str, int]] = {}
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target, status = os.readlink(entry), entry.stat()
            except FileNotFoundError:
                continue  # closed meanwhile
            kind = _kind(target)
            fds[kind] += 1
            if kind.startswith("memfd:"):
                files[status.st_dev, status.st_ino] = kind, 512 * status.st_blocks
        shared: Counter[str] = Counter()
        for kind, nbytes in files.values():
            shared[kind] += nbytes
        status_text = Path(f"/proc/{pid}/status").read_text()
        return cls(
            fds, shared, _field(status_text, "Threads"), 1024 * _field(status_text, "RssAnon")
        )

    def bytes_of(self, pattern: str) -> int:
        """Memory behind the memfds whose name matches."""
        return sum(n for kind, n in self.shared_bytes.items() if re.search(pattern, kind))


def memfd_bytes(pids: Iterable[int], name: str) -> int:
    """Memory behind the memfds `name`... that these processes keep alive together, by an open
    descriptor or by a mapping: it is the system's again when the last of either is gone."""
    files: dict[int, int] = {}
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if os.readlink(entry).startswith(f"/memfd:{name}"):
                    files[entry.stat().st_ino] = 512 * entry.stat().st_blocks
            except FileNotFoundError:
                continue  # closed meanwhile
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            if f"/memfd:{name}" in line:
                addresses, _, _, _, inode, _ = line.split(maxsplit=5)
                first, _, end = addresses.partition("-")
                files.setdefault(int(inode), int(end, 16) - int(first, 16))
    return sum(files.values())


def _kind(target: str) -> str:
    """`memfd:NAME` without the numbers in it, `socket`, `anon_inode:[pidfd]`, or a path."""
    target = target.removesuffix(" (deleted)")
    if target.startswith("/memfd:"):
        return re.sub(r"\d+", "N", target[1:])
    return re.sub(r":\[\d+\]$", "", target)


def _field(text: str, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    assert match is not None, f"/proc says nothing of {name}"
    return int(match[1])
