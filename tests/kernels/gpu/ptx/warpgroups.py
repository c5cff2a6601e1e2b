"""wgmma: products of four warps that go on while the program does, and what must be waited for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tests.kernels.gpu.ptx.errors import Undefined, UnknownPtx
from tests.kernels.gpu.ptx.operands import variable
from tests.kernels.gpu.ptx.tensor_cores import (
    described,
    left_rows,
    registers_of_sums,
    sums,
    warpgroup_mma,
    widened,
)

if TYPE_CHECKING:
    from tests.kernels.gpu.ptx.registers import Registers
    from tests.kernels.gpu.ptx.shared import SharedMemory
    from tests.kernels.gpu.ptx.source import Entry, Instruction

_THREADS: Final = 128
_MMA: Final = re.compile(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16\.bf16|f16\.f16)"
)


@dataclass(slots=True)
class _Group:
    """Products that are waited for together: the sums, the registers that they read, and how many
    matrices in shared memory."""

    sums: dict[str, Any]
    reads: set[str]
    loads: int = 0


def used_by_products(entry: Entry) -> frozenset[str]:
    """The registers of A and of sums, of all its wgmma."""
    return frozenset(
        name
        for instruction in entry.instructions
        if instruction.opcode.startswith("wgmma.mma")
        for name in map(variable, re.findall(r"%\w+", "".join(instruction.operands[:2])))
    )


class Warpgroups:
    """Of a program. Products are computed at once, and come to their registers when the program
    waits: until then these are not there, and the registers of A must stay as they are.

    used: see `used_by_products`.
    """

    def __init__(
        self, used: frozenset[str], threads: int, shared: SharedMemory, registers: Registers
    ) -> None:
        self._shared = shared
        self._registers = registers
        self._threads = np.arange(threads)
        self._open = _Group({}, set())
        self._committed: list[_Group] = []
        self._touched: set[str] = set()
        self._used = used

    def written(self, names: tuple[str, ...]) -> None:
        """By other instructions. Raises Undefined for what a product under way reads or writes."""
        if not self._used or self._used.isdisjoint(names):
            return
        changed = self._used.intersection(names)
        self._touched |= changed
        for group in (*self._committed, self._open):
            if wrong := changed & (group.reads | group.sums.keys()):
                raise Undefined(f"registers of a wgmma under way are written: {sorted(wrong)}")

    def act(self, instruction: Instruction) -> None:
        """Execute it by all threads."""
        opcode = instruction.opcode
        if instruction.guard:
            raise UnknownPtx(instruction.text)
        if opcode == "wgmma.fence.sync.aligned":
            self._touched.clear()
        elif opcode == "wgmma.commit_group.sync.aligned":
            self._committed.append(self._open)
            self._open = _Group({}, set())
        elif opcode == "wgmma.wait_group.sync.aligned":
            self._wait(int(instruction.operands[0], 0))
        elif match := _MMA.fullmatch(opcode):
            self._multiply(instruction, int(match[1]), match[2].split(".")[0])
        else:
            raise UnknownPtx(instruction.text)

    def _wait(self, most: int) -> None:
        while len(self._committed) > most:
            done = self._committed.pop(0)
            later = [*self._committed, self._open]
            going_on = {name for group in later for name in group.sums}
            arrived = done.sums.keys() - going_on
            self._shared.unpin(self._threads, done.loads)
            for name in arrived:
                self._registers.put(name, done.sums[name])

    def _multiply(self, instruction: Instruction, columns: int, dtype: str) -> None:
        target, left, right, scale, *rest = instruction.operands
        names = [variable(each) for each in re.findall(r"%\w+", target)]
        if len(names) * 2 != columns or rest[:2] != ["1", "1"] or any(r != "0" for r in rest[2:]):
            raise UnknownPtx(f"{instruction.text}: only +1, +1 and both along K are known")
        reads = set(map(variable, re.findall(r"%\w+", left))) if left.startswith("{") else set()
        if late := self._touched & (reads | set(names)):
            raise Undefined(f"no wgmma.fence since {sorted(late)} were written")
        before = self._sums(names) if self._adds(scale) else None
        threads = self._threads
        parts = []
        for first in range(0, len(threads), _THREADS):
            group = slice(first, first + _THREADS)
            b = self._matrix(self._register(variable(right))[group], columns, threads[group], dtype)
            if reads:
                four = [self._register(variable(each))[group] for each in re.findall(r"%\w+", left)]
                a = left_rows(four, dtype).reshape(64, 16)
            else:
                a = self._matrix(self._register(variable(left))[group], 64, threads[group], dtype)
            c = None if before is None else sums([each[group] for each in before])
            c = None if c is None else c.reshape(64, columns)
            parts.append(registers_of_sums(warpgroup_mma(a, b.T, c).reshape(4, 16, columns)))
        for name, pieces in zip(names, zip(*parts, strict=True), strict=True):
            self._open.sums[name] = np.concatenate(pieces)
            self._registers.forget(name)
        self._open.reads |= reads

    def _sums(self, names: list[str]) -> list[Any]:
        """What the product is added to: of products under way where they are of this shape."""
        found = []
        for name in names:
            for group in (self._open, *reversed(self._committed)):
                if name in group.sums:
                    found.append(group.sums[name])
                    break
            else:
                found.append(self._register(name))
        return found

    def _register(self, name: str) -> Any:
        value = self._registers.get(name)
        if value is None:
            raise Undefined(f"{name[2:]} was not written")
        return value

    def _adds(self, scale: str) -> bool:
        if scale.lstrip("-").isdigit():
            return int(scale) != 0
        value = self._register(variable(scale))
        if value.any() != value.all():
            raise Undefined(f"{scale} differs between threads")
        return bool(value.all())

    def _matrix(self, descriptor: Any, rows: int, threads: Any, dtype: str) -> Any:
        """float64 [rows, 16] of shared memory."""
        if (descriptor != descriptor[0]).any():
            raise Undefined("a matrix descriptor differs between threads")
        self._open.loads += 1
        octets = self._shared.proxy_load(threads, described(int(descriptor[0]), rows, 16))
        return widened(np.ascontiguousarray(octets).view(np.uint16), dtype)
