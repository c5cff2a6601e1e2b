"""A model's control files (config, tokenizer, index), behind descriptors from the daemon."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping as MappingABC
from typing import TYPE_CHECKING

from tierd_client import fork

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class ControlFiles(MappingABC[str, bytes]):
    """The model's control files by name, read from their descriptors when asked for."""

    def __init__(self, names: Sequence[str], fds: Sequence[int]) -> None:
        self._fds = dict(zip(names, fds, strict=True))
        self._texts: dict[str, bytes] = {}
        self._lock = threading.Lock()
        fork.in_child(self, ControlFiles._close)

    def __getitem__(self, name: str) -> bytes:
        with self._lock:
            if name not in self._texts:
                fd = self._fds[name]
                size = os.fstat(fd).st_size
                self._texts[name] = os.pread(fd, size, 0)
                os.close(self._fds.pop(name))
            return self._texts[name]

    def __iter__(self) -> Iterator[str]:
        return iter([*self._texts, *self._fds])

    def __len__(self) -> int:
        return len(self._texts) + len(self._fds)

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __del__(self) -> None:
        self._close()
