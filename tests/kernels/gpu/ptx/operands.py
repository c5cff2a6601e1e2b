"""What stands behind an opcode, as expressions of Python: registers, numbers, addresses.

Registers are arrays [threads] in unsigned words (predicates: bool); a float is a view of them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tests.kernels.gpu.ptx.errors import UnknownPtx
from tests.kernels.gpu.ptx.source import BYTES

if TYPE_CHECKING:
    from tests.kernels.gpu.ptx.source import Entry

DTYPES: Final = {
    **{f"u{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"b{bits}": np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "pred": np.dtype("?"),
}
_KEPT: Final = {"pred": "pred", **{f"{k}{b}": f"u{b}" for k in "busf" for b in (16, 32, 64)}}
"""What a register of a type is kept as."""
_SPECIAL: Final = re.compile(r"%(n?tid|n?ctaid)\.([xyz])")
_LITERAL: Final = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?|0([fFdD])([0-9a-fA-F]+)")
_ADDRESS: Final = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def variable(register: str) -> str:
    """The name that a register has in Python."""
    return "v_" + register.strip().removeprefix("%").replace("$", "_")


class Operands:
    """Of a block. reads: registers whose numbers come from before it. old: of these, the ones that
    a guarded instruction touches first: not all threads need to have written them. written: those
    that the block has written.
    """

    def __init__(self, entry: Entry, symbols: dict[str, int]) -> None:
        self.entry = entry
        self.symbols = symbols
        self.reads: dict[str, None] = {}
        self.old: dict[str, None] = {}
        self.written: dict[str, None] = {}
        self.constants: dict[str, Any] = {}
        self.has_array = False
        """Whether anything that was read for this instruction is an array."""

    def read(self, operand: str, kind: str, *, array: bool = False) -> str:
        """An expression: an array of DTYPES[kind], or a number that stands in the instruction."""
        if operand.startswith("!"):
            return f"~{self.read(operand[1:], kind, array=True)}"
        if operand in self.entry.registers:
            return self._viewed(operand, kind)
        if special := self._special(operand, kind):
            return special
        return self._constant(self._number(operand, kind), kind, array=array)

    def address(self, operand: str, kind: str) -> str:
        """Of `[register + number]`, as an array of u32 or u64."""
        match = _ADDRESS.fullmatch(operand)
        if match is None:
            raise UnknownPtx(f"address {operand}")
        base, offset = match[1], int(match[2] or "0", 0)
        if base in self.entry.registers:
            found = self._viewed(base, self.kept(base))
            if self.kept(base) != kind:
                found = f"{found}.astype({kind})"
            if offset:
                offset &= (1 << 8 * BYTES[kind]) - 1
                found = f"({found} + {self._constant(offset, kind)})"
            return found
        return self._constant(self._symbol(base) + offset, kind, array=True)

    def registers(self, operand: str) -> list[str]:
        """Of `{a, b}`, or of one operand."""
        text = operand.strip()
        if not text.startswith("{"):
            return [text]
        return [name.strip() for name in text[1:-1].split(",")]

    def many(self, operand: str, kind: str) -> str:
        """`{a, b}` as a list of arrays."""
        return (
            f"[{', '.join(self.read(each, kind, array=True) for each in self.registers(operand))}]"
        )

    def kept(self, register: str) -> str:
        kind = self.entry.registers.get(register)
        if kind not in _KEPT:
            raise UnknownPtx(f"register {register} of type {kind}")
        return _KEPT[kind]

    def touch(self, name: str) -> None:
        """A register is about to be read."""
        if name not in self.written:
            self.reads[name] = None

    def _viewed(self, register: str, kind: str) -> str:
        name, kept = variable(register), self.kept(register)
        self.has_array = True
        self.touch(name)
        if kind == kept or (kind == "pred") != (kept == "pred"):
            if kind != kept:
                raise UnknownPtx(f"register {register} as {kind}")
            return name
        dtype, there = DTYPES[kind], DTYPES[kept]
        if dtype.itemsize > there.itemsize:
            raise UnknownPtx(f"register {register} as {kind}")
        if dtype.itemsize < there.itemsize:
            name = f"{name}.astype(u{dtype.itemsize * 8})"
        return name if dtype.kind == "u" else f"{name}.view({kind})"

    def _special(self, operand: str, kind: str) -> str | None:
        if operand.startswith("%") or operand == "WARP_SZ":
            self.has_array = True
        if match := _SPECIAL.fullmatch(operand):
            if match[1] == "tid":
                return f"M.tid_{match[2]}[t].astype({kind})"
            return f"np.full(n, M.{match[1]}_{match[2]}, {kind})"
        if operand == "%laneid":
            return f"(t % 32).astype({kind})"
        if operand == "WARP_SZ":
            return self._constant(32, kind, array=True)
        return None

    def _symbol(self, name: str) -> int:
        if name not in self.symbols:
            raise UnknownPtx(f"{name} is no register, number or shared variable")
        return self.symbols[name]

    def _number(self, text: str, kind: str) -> Any:
        """The bits that the text stands for, as `kind`."""
        match = _LITERAL.fullmatch(text)
        if match is None:
            return self._symbol(text)
        if match[3]:
            single = match[3] in "fF"
            bits = int(match[4], 16)
            if single == (BYTES.get(kind) == 4):
                return bits
            raise UnknownPtx(f"{text} as {kind}")
        number = int(match[2], 0)
        if kind in ("f32", "f64"):
            raise UnknownPtx(f"{text} as {kind}")
        return -number if match[1] else number

    def _constant(self, number: int, kind: str, *, array: bool = False) -> str:
        name = f"K{len(self.constants)}"
        dtype = DTYPES[kind]
        self.has_array |= array
        if kind == "pred":
            self.constants[name] = np.bool_(number != 0)
            return f"np.full(n, {name}, bool)" if array else name
        bits = np.array(number & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}")
        self.constants[name] = bits.view(dtype)[()]
        return f"np.full(n, {name}, {kind})" if array else name
