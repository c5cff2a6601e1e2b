"""One program of a grid, all of its threads at once.

Threads that went different ways are run block by block, the first block in the text first: there
compilers let ways meet again.
"""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tests.kernels.gpu.ptx.errors import PtxError, Undefined, UnknownPtx
from tests.kernels.gpu.ptx.mbarriers import Mbarriers, Parked
from tests.kernels.gpu.ptx.operands import variable
from tests.kernels.gpu.ptx.registers import Registers
from tests.kernels.gpu.ptx.tensor_memory import TensorMemory
from tests.kernels.gpu.ptx.warpgroups import Warpgroups

if TYPE_CHECKING:
    from tests.kernels.gpu.ptx.machine import Kernel
    from tests.kernels.gpu.ptx.memory import GlobalMemory
    from tests.kernels.gpu.ptx.shared import SharedMemory
    from tests.kernels.gpu.ptx.translate import Translated

MOST_BLOCKS: Final = 1 << 18
"""That a program executes: far more than any of ours, and less than for ever."""


class Program:
    """One of the grid. What translated code asks for is public: `M` there."""

    def __init__(
        self,
        kernel: Kernel,
        place: tuple[int, ...],
        grid: tuple[int, ...],
        shape: tuple[int, ...],
        parameters: dict[str, bytes],
        memory: GlobalMemory,
        shared: SharedMemory,
    ) -> None:
        self.globals = memory
        self.shared = shared
        self.ctaid_x, self.ctaid_y, self.ctaid_z = place
        self.nctaid_x, self.nctaid_y, self.nctaid_z = grid
        self.ntid_x, self.ntid_y, self.ntid_z = shape
        self._all = np.arange(int(np.prod(shape)))
        self.tid_x = self._all % shape[0]
        self.tid_y = self._all // shape[0] % shape[1]
        self.tid_z = self._all // (shape[0] * shape[1])
        self.tensor = TensorMemory(shared)
        self.mbarriers = Mbarriers(shared, self.tensor)
        self._kernel = kernel
        self._parameters = parameters
        self._registers = Registers(kernel.dtypes, len(self._all))
        self._warpgroups = Warpgroups(kernel.products, len(self._all), shared, self._registers)
        self._executed = 0

    def parameter(self, name: str, nbytes: int, threads: int) -> Any:
        """Of UNIT[nbytes], [threads]. name: of the parameter, `+ offset` may follow."""
        base, _, offset = name.replace(" ", "").partition("+")
        octets = self._parameters[base][int(offset or "0", 0) :][:nbytes]
        return np.frombuffer(octets * threads, f"V{nbytes}").view(f"u{min(nbytes, 8)}")

    def fetched(self, site: int, address: Any, nbytes: int, count: Any, where: Any) -> Any:
        """What a cp.async reads: `count` bytes of `nbytes`, zeros behind them."""
        if count is None:
            return self.globals.load(site, address, nbytes, where)
        if ((count != 0) & (count != nbytes)).any():
            raise UnknownPtx(f"cp.async of {np.unique(count)} of {nbytes} bytes")
        there = count != 0
        data = self.globals.load(site, address, nbytes, there if where is None else there & where)
        data[~there] = 0
        return data

    def ask(self, written: Any, where: Any, register: str) -> None:
        """Whether those that need a register (`where`, or all) have written it."""
        if not (written if where is None else written | ~where).all():
            raise Undefined(f"{register} was not written by all threads")

    # -------------------------------------------------------------------------------- control

    def run(self) -> None:
        code = self._kernel.blocks
        at: Any = 0  # of all threads, or [threads]
        waiting, parked = (np.zeros(len(self._all), np.bool_) for _ in range(2))
        while True:
            if isinstance(at, int):
                if at == len(code):
                    break
                at = self._together(code[at])
                continue
            here = ~waiting & (at < len(code))
            ready = here & ~parked
            if ready.any():
                number = int(at[ready].min())
                threads = (ready & (at == number)).nonzero()[0]
                parked[threads] = not self._apart(code[number], threads, at, waiting)
                if not parked[threads[0]]:
                    parked[:] = False  # what they wait for may have come
            elif here.any():
                raise Undefined(f"program {self._place}: waits at an mbarrier for ever")
            elif waiting.any():
                self._meet(code, at, waiting)
                at, waiting[:] = at + 1, False
            else:
                break
            if not waiting.any() and (at == at[0]).all():
                at, parked[:] = int(at[0]), False
        self.tensor.end()

    def _together(self, code: Translated) -> Any:
        try:
            taken = self._execute(code, None)
        except Parked:
            raise Undefined(f"program {self._place}: waits at an mbarrier for ever") from None
        block = code.block
        if block.kind == "barrier":
            self._meet_all()
            return block.following
        if block.kind == "act":
            assert block.end is not None
            self._failing(code, lambda: self._warpgroups.act(block.end))
            return block.following
        if block.kind == "jump" or taken.all():
            return block.target
        return np.where(taken, block.target, block.following) if taken.any() else block.following

    def _apart(self, code: Translated, threads: Any, at: Any, waiting: Any) -> bool:
        """Whether they went on."""
        block = code.block
        try:
            taken = self._execute(code, threads)
        except Parked:
            return False
        if block.kind == "branch":
            at[threads] = np.where(taken, block.target, block.following)
        elif block.kind == "jump":
            at[threads] = block.target
        elif block.kind == "barrier":
            waiting[threads] = True
        elif block.end is not None:
            raise Undefined(f"{self._where(block.end)}: only {len(threads)} threads are here")
        return True

    def _meet(self, code: list[Translated], at: Any, waiting: Any) -> None:
        """All that are left wait."""
        end = code[int(at[waiting][0])].block.end
        if not waiting.all():
            raise Undefined(f"{self._where(end)}: waits for threads that have ended")
        warps = at[: len(at) // 32 * 32].reshape(-1, 32)
        if (warps != warps[:, :1]).any():
            raise Undefined(f"{self._where(end)}: a warp waits at two barriers")
        self._meet_all()

    def _meet_all(self) -> None:
        self.shared.barrier()
        self.tensor.barrier()

    # ------------------------------------------------------------------------------ execution

    def _execute(self, code: Translated, threads: Any) -> Any:
        """The block, by these threads or (None) all; where its branch is taken."""
        self._executed += 1
        if self._executed > MOST_BLOCKS:
            raise Undefined(f"program {self._place}: more than {MOST_BLOCKS} blocks")
        inputs = []
        for name in code.reads:
            value = self._registers.get(name, threads)
            if value is None:
                if name not in code.old:
                    self._refuse(code, name)
                value = self._registers.get_old(name, threads)
            inputs.append(value)
        inputs += [self._registers.written(name, threads) for name in code.old]
        here = self._all if threads is None else threads
        taken, outputs, who = self._failing(code, lambda: code.function(self, here, *inputs))
        written = dict(zip(code.old, who, strict=True))
        self._failing(code, lambda: self._warpgroups.written(code.writes))
        for name, value in zip(code.writes, outputs, strict=True):
            self._registers.put(name, value, threads, written.get(name))
        return taken

    # -------------------------------------------------------------------------------- errors

    @property
    def _place(self) -> tuple[int, int, int]:
        return self.ctaid_x, self.ctaid_y, self.ctaid_z

    def _where(self, instruction: Any) -> str:
        return f"program {self._place}, line {instruction.line}, {instruction.text!r}"

    def _refuse(self, code: Translated, name: str) -> None:
        for user in (*code.block.instructions, code.block.end):
            if user is not None and name in map(variable, re.findall(r"%?[\w$]+", user.text)):
                raise Undefined(f"{self._where(user)}: {name[2:]} was not written")
        raise Undefined(f"program {self._place}: {name[2:]} was not written")

    def _failing(self, code: Translated, work: Any) -> Any:
        """What `work` returns; an error of it names the instruction."""
        try:
            return work()
        except PtxError as error:
            frames = traceback.extract_tb(error.__traceback__)
            line = next((f.lineno for f in frames if f.filename.startswith("<ptx ")), None)
            instruction = code.lines.get(line or 0, code.block.end)
            raise type(error)(f"{self._where(instruction)}: {error}") from error
