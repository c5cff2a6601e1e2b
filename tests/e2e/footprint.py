"""What a process takes of the machine, as the kernel counts it and not as the process says."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path


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
