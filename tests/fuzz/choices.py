"""Bytes to decisions, so that a fuzzer that changes bytes changes what a test does."""

from collections.abc import Sequence
from typing import Final, TypeVar

Item = TypeVar("Item")


class Choices:
    """Takes decisions from `data`, first to last; when it is used up, all of them are 0."""

    def __init__(self, data: bytes) -> None:
        self._data: Final = data
        self._at = 0

    def take(self, nbytes: int) -> bytes:
        """Return the next bytes, fewer at the end."""
        taken = self._data[self._at : self._at + nbytes]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        return self.take(len(self._data))

    def below(self, limit: int) -> int:
        """Return a number in [0, limit); limit must be positive."""
        nbytes = max(1, ((limit - 1).bit_length() + 7) // 8)
        return int.from_bytes(self.take(nbytes), "little") % limit

    def flag(self) -> bool:
        return self.below(2) == 1

    def pick(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def integer(self) -> int:
        """Return a number at which sizes and indices break, or any 64-bit one."""
        kind = self.below(4)
        if kind == 0:
            return self.below(256)
        if kind == 1:
            return int.from_bytes(self.take(8), "little")
        return (1 << self.below(70)) + self.below(5) - 2
