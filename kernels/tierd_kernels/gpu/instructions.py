"""The instructions of a compiled kernel, how few of them a warp can come through with, and how many
of these the integer pipe takes.

Of the text that `cuobjdump -sass` prints. A tile in which nothing is wrong and that has no escapes
takes the shortest way: branches lead around what other tiles need.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

_LINE: Final = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")

INTEGER_PIPE: Final = re.compile(
    r"BMSK|CSEL|FMNMX|FSEL|FSETP|I2FP|IABS|IADD3|IMNMX|ISETP|LEA|LOP3|MOV|P2R|PLOP3|PRMT|PSETP"
    r"|R2P|SEL|SGXT|SHF|VABSDIFF4?|VIADD|VIADDMNMX|VIMNMX"
)
"""What a quarter of a multiprocessor executes on its "ALU" pipe, one instruction of a warp in two
cycles; multiplications and dot products of integers (IMAD, IDP) run on another, and so do the moves
and additions that are written as one (IMAD.MOV, IMAD.IADD), POPC, SHFL and what begins with U.

Sources: Nsight Compute, "Pipelines" (ALU: most bit manipulation and logic, integers but for IMAD
and IMUL); CUDA C++ Programming Guide, throughput of arithmetic instructions: 64 additions,
comparisons, shifts, permutations or logical operations a cycle for 8.0 and 9.0. Which opcode is on
which pipe is written nowhere for all of them: these are understood so.
"""


@dataclass(frozen=True, slots=True)
class Instruction:
    address: int
    always: bool
    name: str
    operands: str

    @property
    def of_integer_pipe(self) -> bool:
        return INTEGER_PIPE.fullmatch(self.name.split(".")[0]) is not None

    @property
    def target(self) -> int:
        """Where a branch leads to: the last operand."""
        return int(self.operands.rsplit("0x", 1)[1].split()[0].rstrip(",)"), 16)


def count(code: str) -> int:
    """All instructions, each counted once."""
    return sum(each.name != "NOP" for each in _instructions(code))


def fewest(code: str) -> list[Instruction]:
    """The instructions that a warp executes at least between the kernel's first and an exit."""
    listed = _instructions(code)
    exits = {i for i, each in enumerate(listed) if each.name == "EXIT" and each.always}
    return _shortest(listed, 0, exits)


def fewest_of_loop(code: str, operand: str = "", times: int = 0) -> list[Instruction]:
    """The instructions that a warp executes at least in one turn of the longest loop; through
    the first `times` of them that have this operand.
    """
    listed = _instructions(code)
    back = [
        each for each in listed if each.name.split(".")[0] == "BRA" and each.target < each.address
    ]
    if not back:
        raise ValueError(f"no loop in {len(listed)} instructions")
    last = max(back, key=lambda each: each.address - each.target)
    number = {each.address: index for index, each in enumerate(listed)}
    first, end = number[last.target], number[last.address]
    marked = [at for at in range(first, end) if operand in listed[at].operands.split(", ")]
    if len(marked) < times:
        raise ValueError(f"{len(marked)} instructions with the operand {operand}, not {times}")
    way = [listed[first]]
    for start, stop in pairwise([first, *marked[:times], end]):
        way += _shortest(listed, start, {stop})[1:]
    return way


def _shortest(listed: list[Instruction], start: int, ends: set[int]) -> list[Instruction]:
    """The shortest way from one instruction to any of several, both included, without padding."""
    ways = _following(listed)
    reached, before, heap = {start: 0}, {start: start}, [(0, start)]
    while heap:
        taken, at = heapq.heappop(heap)
        if taken > reached[at]:
            continue
        if at in ends:
            way = [at]
            while at != start:
                at = before[at]
                way.append(at)
            return [listed[each] for each in reversed(way) if listed[each].name != "NOP"]
        taken += listed[at].name != "NOP"
        for following in ways[at]:
            if taken < reached.get(following, taken + 1):
                reached[following], before[following] = taken, at
                heapq.heappush(heap, (taken, following))
    raise ValueError(f"no way leads on from instruction {start} of {len(listed)}")


def _instructions(code: str) -> list[Instruction]:
    return [
        Instruction(int(found[1], 16), not (found[2] or "").strip(" @PT"), found[3], found[4])
        for line in code.splitlines()
        if (found := _LINE.match(line))
    ]


def _following(listed: list[Instruction]) -> list[list[int]]:
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
