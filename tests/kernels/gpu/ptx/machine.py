"""Runs PTX text on arrays of the host: the programs of a grid, one after another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.kernels.gpu.ptx import effects, tensor_effects
from tests.kernels.gpu.ptx.blocks import blocks
from tests.kernels.gpu.ptx.errors import PtxError, UnknownPtx
from tests.kernels.gpu.ptx.memory import Array, GlobalMemory
from tests.kernels.gpu.ptx.program import Program
from tests.kernels.gpu.ptx.races import BASE
from tests.kernels.gpu.ptx.registers import dtypes_of
from tests.kernels.gpu.ptx.shared import SharedMemory
from tests.kernels.gpu.ptx.source import Entry, entries
from tests.kernels.gpu.ptx.translate import Translated, translated
from tests.kernels.gpu.ptx.warpgroups import used_by_products

if TYPE_CHECKING:
    from collections.abc import Sequence

assert effects
assert tensor_effects  # their handlers are registered


@dataclass(frozen=True, slots=True)
class Kernel:
    """An entry, translated. dtypes: see `registers.py`; products: `warpgroups.used_by_products`."""

    entry: Entry
    blocks: list[Translated]
    static_bytes: int
    """Of shared memory, before what a launch adds."""
    dtypes: dict[str, np.dtype[Any]]
    products: frozenset[str]


@cache
def kernel(text: str, name: str | None = None) -> Kernel:
    """Of PTX text; `name` where it has several. Raises UnknownPtx."""
    found = entries(text)
    if name is None and len(found) != 1:
        raise UnknownPtx(f"which of the entries {', '.join(found)}?")
    entry = found[name] if name is not None else next(iter(found.values()))
    symbols, end = {}, BASE
    for name_of, (nbytes, align) in entry.shared.items():
        symbols[name_of] = end = -(-end // align) * align
        end += nbytes
    end = -(-end // 128) * 128
    symbols |= dict.fromkeys(entry.external, end)
    code = translated(entry, blocks(entry), symbols)
    return Kernel(entry, code, end - BASE, dtypes_of(entry), used_by_products(entry))


def launch(
    kernel: Kernel,
    grid: Sequence[int],
    threads: Sequence[int] | int,
    arguments: Sequence[int | np.generic],
    arrays: list[Array],
    shared_bytes: int = 0,
) -> None:
    """Run it. Raises PtxError, which names the program and the instruction.

    arguments: one for each parameter: addresses, integers, or numpy's numbers of its size.
    arrays: all that the kernel may touch. shared_bytes: of the external shared variable.
    """
    counts = (threads,) if isinstance(threads, int) else tuple(threads)
    shape = (*counts, 1, 1)[:3]
    wanted = kernel.entry.threads
    if wanted is not None and wanted != np.prod(shape):
        raise PtxError(f"{shape} threads, the text requires {wanted}")
    parameters = _parameters(kernel.entry, arguments)
    memory = GlobalMemory(arrays)
    whole = (*grid, 1, 1)[:3]
    for z, y, x in np.ndindex(whole[2], whole[1], whole[0]):
        memory.next_program()
        shared = SharedMemory(kernel.static_bytes + shared_bytes, int(np.prod(shape)))
        program = Program(kernel, (x, y, z), whole, shape, parameters, memory, shared)
        with np.errstate(all="ignore"):
            program.run()


def _parameters(entry: Entry, arguments: Sequence[int | np.generic]) -> dict[str, bytes]:
    if len(arguments) != len(entry.parameters):
        raise PtxError(f"{len(arguments)} arguments for {len(entry.parameters)} parameters")
    found = {}
    for parameter, argument in zip(entry.parameters, arguments, strict=True):
        if isinstance(argument, np.generic):
            octets = argument.tobytes()
        else:
            octets = (int(argument) & (1 << 8 * parameter.nbytes) - 1).to_bytes(
                parameter.nbytes, "little"
            )
            if int(argument).bit_length() > 8 * parameter.nbytes:
                raise PtxError(f"{argument} for {parameter.name}, {parameter.nbytes} bytes")
        if len(octets) != parameter.nbytes:
            raise PtxError(f"{len(octets)} bytes for {parameter.name}, {parameter.nbytes} bytes")
        found[parameter.name] = octets
    return found
