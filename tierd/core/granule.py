"""A granule that small slots share: which bytes of it are free."""

from __future__ import annotations

SMALL_ALIGNMENT = 4096


class SharedGranule:
    """Bytes are counted from its begin; slots begin on SMALL_ALIGNMENT."""

    __slots__ = ("_holes", "slots", "warm")

    def __init__(self, nbytes: int, *, warm: bool) -> None:
        """nbytes: of the whole granule, all free. warm: whether there is memory behind it."""
        self.slots = 0
        self.warm = warm
        self._holes = [(0, nbytes)]  # [begin, end), sorted, none beside another

    def hole(self, nbytes: int) -> int | None:
        """Where the first hole of so many bytes begins."""
        for begin, end in self._holes:
            if end - begin >= nbytes:
                return begin
        return None

    def take(self, begin: int, nbytes: int) -> None:
        """A slot lies there now, inside one of the holes."""
        self.slots += 1
        end = begin + _aligned(nbytes)
        rest: list[tuple[int, int]] = []
        for first, last in self._holes:
            if first <= begin and end <= last:
                rest += [hole for hole in ((first, begin), (end, last)) if hole[0] < hole[1]]
            else:
                rest.append((first, last))
        self._holes = rest

    def give_back(self, begin: int, nbytes: int) -> None:
        """The slot there is gone."""
        self.slots -= 1
        joined: list[tuple[int, int]] = []
        for hole in sorted([*self._holes, (begin, begin + _aligned(nbytes))]):
            if joined and joined[-1][1] == hole[0]:
                joined[-1] = (joined[-1][0], hole[1])
            else:
                joined.append(hole)
        self._holes = joined


def _aligned(nbytes: int) -> int:
    return -(-nbytes // SMALL_ALIGNMENT) * SMALL_ALIGNMENT
