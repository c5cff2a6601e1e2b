"""The readers of a pack.

Models whose `tierd.json` has the same owner, group and read bits share an arena, because whoever
may read one of them may read all of them. An arena is handed only to peers that may read the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from tierd.io.process import PeerCredentials

_TEXT = re.compile(r"u(\d+)-g(\d+)-m([0-7]{3})")
READ_BITS = 0o444


@dataclass(frozen=True, slots=True, order=True)
class AccessGroup:
    """A file's owner, group and read bits."""

    uid: int
    gid: int
    mode: int

    @classmethod
    def of(cls, status: os.stat_result) -> AccessGroup:
        return cls(status.st_uid, status.st_gid, status.st_mode & READ_BITS)

    @classmethod
    def parse(cls, text: str) -> AccessGroup | None:
        """What `str(group)` wrote, or None when the text is something else."""
        match = _TEXT.fullmatch(text)
        if match is None:
            return None
        return cls(int(match[1]), int(match[2]), int(match[3], 8) & READ_BITS)

    def __str__(self) -> str:
        return f"u{self.uid}-g{self.gid}-m{self.mode:03o}"

    def admits(self, peer: PeerCredentials) -> bool:
        return peer.may_read(uid=self.uid, gid=self.gid, mode=self.mode)
