"""A basic block as a Python function of arrays, one statement of numpy for most instructions.

Registers are arrays [threads] in unsigned words (predicates: bool); a float is a view of them.
Nothing is computed in place, so that two registers may share an array.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tests.kernels.gpu.ptx import arithmetic, memory, tensor_cores, warps
from tests.kernels.gpu.ptx.errors import UnknownPtx
from tests.kernels.gpu.ptx.operands import DTYPES, Operands, variable
from tests.kernels.gpu.ptx.operations import OPERATIONS, Operation
from tests.kernels.gpu.ptx.source import Entry, Instruction

if TYPE_CHECKING:
    from tests.kernels.gpu.ptx.blocks import Block

Handler = Callable[["Writer", Instruction, re.Match[str]], None]
HANDLERS: Final[list[tuple[re.Pattern[str], Handler]]] = []
"""Of instructions that do more than compute; `effects.py` has them."""


def handles(pattern: str) -> Callable[[Handler], Handler]:
    """Decorates what writes the instructions whose opcode is this pattern, as a whole."""

    def register(handler: Handler) -> Handler:
        HANDLERS.append((re.compile(pattern), handler))
        return handler

    return register


@dataclass(frozen=True, slots=True)
class Translated:
    """function: (machine, threads, *registers of `reads`, *who has written those of `old`) ->
    (where the branch is taken, the registers of `writes`, who has now written those of `old`).
    old: of `reads`, those of which not all threads need to have written theirs; "who" is bool
    [threads], or None for all. lines: the instruction of each line of its source."""

    block: Block
    function: Callable[..., Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    old: tuple[str, ...]
    lines: dict[int, Instruction]


def translated(entry: Entry, blocks: list[Block], symbols: dict[str, int]) -> list[Translated]:
    """All blocks. symbols: addresses of shared variables. Raises UnknownPtx."""
    writers = [Writer(entry, block, symbols) for block in blocks]
    for writer in writers:
        writer.write_block()
    elsewhere = {name for writer in writers for name in writer.reads}
    for block in blocks:
        if block.kind == "act" and block.end is not None:
            elsewhere |= {f"v_{name}" for name in re.findall(r"%(\w+)", block.end.text)}
    return [writer.compiled(elsewhere) for writer in writers]


class Writer(Operands):
    """Writes the function of a block."""

    def __init__(self, entry: Entry, block: Block, symbols: dict[str, int]) -> None:
        super().__init__(entry, symbols)
        self._block = block
        self._source: list[str] = []
        self._lines: dict[int, Instruction] = {}
        self._instruction: Instruction | None = None
        self._in_guard = False
        self._names = 0
        self._taken = "None"

    # ------------------------------------------------------------------ the whole function

    def write_block(self) -> None:
        for instruction in self._block.instructions:
            self._begin(instruction)
            if operation := OPERATIONS.get(instruction.opcode):
                self._compute(instruction, operation)
                continue
            for pattern, handler in HANDLERS:
                if match := pattern.fullmatch(instruction.opcode):
                    handler(self, instruction, match)
                    break
            else:
                raise UnknownPtx(f"line {instruction.line}: {instruction.text}")
        if self._block.kind == "branch" and self._block.end is not None:
            self._begin(self._block.end)
            self._taken = self.guard(self._block.end) or "None"

    def compiled(self, elsewhere: set[str]) -> Translated:
        """elsewhere: registers that some block reads."""
        writes = tuple(name for name in self.written if name in elsewhere)
        who = [f"who_{name}" for name in self.old]
        head = f"def block({', '.join(['M', 't', *self.reads, *who])}):"
        returned = f"    return {self._taken}, ({_listed(writes)}), ({_listed(who)})"
        body = ["    n = len(t)", *(f"    {line}" for line in self._source), returned]
        space: dict[str, Any] = dict(_NAMESPACE) | self.constants
        source = "\n".join([head, *body])
        exec(compile(source, f"<ptx {self.entry.name} {self._block.number}>", "exec"), space)
        reads, old = tuple(self.reads), tuple(self.old)
        return Translated(self._block, space["block"], reads, writes, old, self._lines)

    def _begin(self, instruction: Instruction) -> None:
        self._instruction = instruction
        self.has_array = False

    def _compute(self, instruction: Instruction, operation: Operation) -> None:
        result, *sources = instruction.operands
        if len(sources) != len(operation.sources):
            raise UnknownPtx(f"line {instruction.line}: {instruction.text}")
        read = [
            self.read(source, kind, array=operation.arrays)
            for source, kind in zip(sources, operation.sources, strict=True)
        ]
        self.write(result, operation.result, operation.expression.format(*read))

    # ---------------------------------------------------------------------- for handlers

    def line(self, text: str) -> None:
        if self._instruction is not None:
            self._lines[len(self._source) + 3] = self._instruction  # behind "def" and "n ="
        self._source.append(text)

    def new_name(self) -> str:
        self._names += 1
        return f"_{self._names}"

    def guard(self, instruction: Instruction) -> str | None:
        """An array of bool, or None."""
        if instruction.guard is None:
            return None
        self._in_guard = True
        found = self.read(instruction.guard, "pred", array=True)
        self._in_guard = False
        return f"~{found}" if instruction.negated else found

    def touch(self, name: str) -> None:
        """What is read where a guard holds, those threads must have written; otherwise all."""
        assert self._instruction is not None
        where = None if self._in_guard else self.guard(self._instruction)
        if name not in self.written and name not in self.reads and where:
            self.old[name] = None
        super().touch(name)
        if name in self.old:
            self.line(f"if who_{name} is not None: M.ask(who_{name}, {where}, {name[2:]!r})")

    def write(self, operand: str, kind: str, expression: str, *, array: bool = False) -> None:
        """Into a register that is as wide as `kind`, or wider: then it is extended.

        array: the expression is one, whatever was read for it.
        """
        self.has_array |= array
        if operand == "_":
            return
        name, kept = variable(operand), self.kept(operand)
        dtype, wanted = DTYPES[kind], DTYPES[kept]
        if dtype.itemsize > wanted.itemsize or (kind == "pred") != (kept == "pred"):
            raise UnknownPtx(f"{kind} in register {operand}")
        if not self.has_array:
            expression = f"np.full(n, {expression}, {kind})"
        if dtype.itemsize < wanted.itemsize:
            wide = f"s{wanted.itemsize * 8}" if dtype.kind == "i" else kept
            expression = f"({expression}).astype({wide})"
            dtype = DTYPES[wide]
        if dtype != wanted:
            expression = f"({expression}).view({kept})"
        assert self._instruction is not None
        if where := self.guard(self._instruction):
            if name not in self.written and name not in self.reads:
                self.reads[name] = self.old[name] = None
            expression = f"np.where({where}, {expression}, {name})"
        self.line(f"{name} = {expression}")
        # Triton reduces over lanes of which only some have loaded a number: what the others have
        # reaches no result, and is a pattern here so that it would be seen in one.
        loads = self._instruction.opcode.startswith("ld.")
        if name in self.old and where and not loads:
            self.line(f"if who_{name} is not None: who_{name} = who_{name} | {where}")
        elif name in self.old:
            self.line(f"who_{name} = None")
        self.written[name] = None


def _listed(names: Sequence[str]) -> str:
    """As a tuple has them."""
    return "".join(f"{name}, " for name in names)


_NAMESPACE: Final[dict[str, Any]] = {
    "np": np,
    "bool": np.bool_,
    "UNIT": memory.UNIT,
    **DTYPES,
    **{name: value for name, value in vars(arithmetic).items() if not name.startswith("_")},
    **{name: value for name, value in vars(warps).items() if not name.startswith("_")},
    **{name: value for name, value in vars(tensor_cores).items() if not name.startswith("_")},
}
