"""The instructions of a compiled kernel, and how few of them a warp can come through with.

Of the text that `cuobjdump -sass` prints. A tile in which nothing is wrong and that has no escapes
takes the shortest way: branches lead around what other tiles need.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass
from typing import Final

_LINE: Final = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


@dataclass(frozen=True, slots=True)
class _Instruction:
    address: int
    always: bool
    name: str
    operands: str

    @property
    def target(self) -> int:
        """Where a branch leads to: the last operand."""
        return int(self.operands.rsplit("0x", 1)[1].split()[0].rstrip(",)"), 16)


def count(code: str) -> int:
    """All instructions, each counted once."""
    return sum(each.name != "NOP" for each in _instructions(code))


def fewest(code: str) -> int:
    """The instructions that a warp executes at least between the kernel's first and an exit."""
    listed = _instructions(code)
    exits = {i for i, each in enumerate(listed) if each.name == "EXIT" and each.always}
    return _shortest(listed, 0, exits)


def fewest_of_loop(code: str) -> int:
    """The instructions that a warp executes at least in one turn of the longest loop."""
    listed = _instructions(code)
    back = [
        each for each in listed if each.name.split(".")[0] == "BRA" and each.target < each.address
    ]
    if not back:
        raise ValueError(f"no loop in {len(listed)} instructions")
    last = max(back, key=lambda each: each.address - each.target)
    number = {each.address: index for index, each in enumerate(listed)}
    return _shortest(listed, number[last.target], {number[last.address]})


def _shortest(listed: list[_Instruction], start: int, ends: set[int]) -> int:
    """The instructions on the shortest way from one to any of several, both included."""
    ways = _following(listed)
    reached, heap = {start: 0}, [(0, start)]
    while heap:
        taken, at = heapq.heappop(heap)
        if taken > reached[at]:
            continue
        taken += listed[at].name != "NOP"
        if at in ends:
            return taken
        for following in ways[at]:
            if taken < reached.get(following, taken + 1):
                reached[following] = taken
                heapq.heappush(heap, (taken, following))
    raise ValueError(f"no way leads on from instruction {start} of {len(listed)}")


def _instructions(code: str) -> list[_Instruction]:
    return [
        _Instruction(int(found[1], 16), not (found[2] or "").strip(" @PT"), found[3], found[4])
        for line in code.splitlines()
        if (found := _LINE.match(line))
    ]


def _following(listed: list[_Instruction]) -> list[list[int]]:
    """What can come after each instruction. Those that exit under a condition go on, too."""
    number = {each.address: index for index, each in enumerate(listed)}
    joins: dict[str, int] = {}
    ways = []
    for index, each in enumerate(listed):
        found = [index + 1] if index + 1 < len(listed) else []
        match each.name.split(".")[0]:
            case "BSSY":
                joins[each.operands.split(",")[0].strip()] = number[each.target]
            case "BSYNC":
                join = joins[each.operands.split(",")[0].strip()]
                found = [join, *found] if not each.always else [join]
            case "BRA":
                target = number[each.target]
                found = [target, *found] if not each.always else [target]
        ways.append(found)
    return ways
