"""An entry cut into basic blocks: instructions that are always executed one after another.

A block ends where threads may go different ways, wait for each other, or where the whole program
acts at once (wgmma).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tests.kernels.gpu.ptx.errors import UnknownPtx

if TYPE_CHECKING:
    from tests.kernels.gpu.ptx.source import Entry, Instruction

BARRIERS: Final = frozenset(
    {("bar.sync", "0"), ("barrier.sync", "0"), ("barrier.sync.aligned", "0")}
)
_ENDS: Final = frozenset({"ret", "exit"})


@dataclass(frozen=True, slots=True)
class Block:
    """kind: "jump" to `target`; "branch" there where the guard of `end` holds; a "barrier" or an
    "act", and then to `following`, as where a branch is not taken. Block number `exit` is no block:
    the end."""

    number: int
    instructions: tuple[Instruction, ...]
    kind: str
    end: Instruction | None
    target: int
    following: int


def blocks(entry: Entry) -> list[Block]:
    """Raises UnknownPtx."""
    code = entry.instructions
    targets = {entry.labels[name] for name in map(_target, code) if name in entry.labels}
    starts = [0]
    for place, instruction in enumerate(code, 1):
        if (place in targets or _kind(instruction)) and place < len(code):
            starts.append(place)
    # Threads that wait there begin again: nothing is done before in their block.
    starts += [i for i, each in enumerate(code) if each.opcode.startswith("mbarrier.try_wait")]
    starts = sorted(set(starts))
    number = {start: i for i, start in enumerate(starts)}
    number[len(code)] = len(starts)
    found = []
    for i, start in enumerate(starts):
        end = starts[i + 1] if i + 1 < len(starts) else len(code)
        found.append(_block(entry, i, code[start:end], number))
    return found


def _target(instruction: Instruction) -> str | None:
    return instruction.operands[0] if instruction.opcode.split(".")[0] == "bra" else None


def _kind(instruction: Instruction) -> str | None:
    """How the instruction ends its block, if it does."""
    if instruction.opcode in ("bra", "bra.uni") or instruction.opcode in _ENDS:
        return "branch" if instruction.guard else "jump"
    if instruction.opcode.startswith(("bar.sync", "barrier.sync")):
        if (
            instruction.opcode,
            ",".join(instruction.operands),
        ) not in BARRIERS or instruction.guard:
            raise UnknownPtx(f"{instruction.text}: a barrier that is not 0, of all threads")
        return "barrier"
    return "act" if instruction.opcode.startswith("wgmma.") else None


def _block(entry: Entry, i: int, code: list[Instruction], number: dict[int, int]) -> Block:
    last = code[-1]
    kind = _kind(last)
    if kind is None:
        return Block(i, tuple(code), "jump", None, i + 1, i + 1)
    target = i + 1
    if last.opcode in _ENDS:
        target = number[len(entry.instructions)]
    elif (label := _target(last)) is not None:
        if label not in entry.labels:
            raise UnknownPtx(f"line {last.line}: no label {label}")
        target = number[entry.labels[label]]
    return Block(i, tuple(code[:-1]), kind, last, target, i + 1)
