"""A few instructions as a whole kernel, for tests: numbers in, numbers out, a thread for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tests.kernels.gpu.ptx.machine import kernel, launch
from tests.kernels.gpu.ptx.memory import Array

if TYPE_CHECKING:
    from collections.abc import Sequence

_REGISTERS = """
    .reg .pred %p<16>;
    .reg .b16 %rs<32>;
    .reg .b32 %r<64>;
    .reg .b64 %rd<64>;
"""
_FAMILY = {1: "rs", 2: "rs", 4: "r", 8: "rd"}


def text(body: str, parameters: int = 0, head: str = "") -> str:
    """An entry `k` of pointers k_0, k_1.. to which `%rd60` and `%r60`, the thread, are known."""
    declared = ", ".join(f".param .u64 k_{i}" for i in range(parameters))
    return f"{head}\n.visible .entry k({declared})\n{{{_REGISTERS}mov.u32 %r60, %tid.x;\n{body}\n}}"


def run(
    body: str,
    arrays: Sequence[Any] = (),
    *,
    threads: int = 32,
    programs: int = 1,
    shared_bytes: int = 0,
    head: str = "",
) -> None:
    """Run a body whose parameters are these arrays; all of them may be written to."""
    launch(
        kernel(text(body, len(arrays), head)),
        (programs,),
        threads,
        [array.ctypes.data for array in arrays],
        [Array(f"k_{i}", array.ctypes.data, array.nbytes) for i, array in enumerate(arrays)],
        shared_bytes,
    )


def computed(instructions: str, sources: Sequence[Any], result: str) -> Any:
    """What register `result` ("%r9") holds in each thread at the end.

    sources: arrays of unsigned [threads]; the first is in %r0, %rd0 or %rs0, the next in number 1.
    """
    threads = len(sources[0])
    body = []
    for i, source in enumerate(sources):
        nbytes = source.itemsize
        body.append(_pointer(i, nbytes))
        body.append(f"ld.global.b{8 * nbytes} %{_FAMILY[nbytes]}{i}, [%rd61];")
    out: Any = {"%rs": np.uint16, "%rd": np.uint64}.get(result[:3], np.uint32)
    found = np.zeros(threads, out)
    body += [instructions, _pointer(len(sources), found.itemsize)]
    if result.startswith("%p"):
        body += [f"selp.b32 %r59, 1, 0, {result};", "st.global.b32 [%rd61], %r59;"]
    else:
        body.append(f"st.global.b{8 * found.itemsize} [%rd61], {result};")
    run("\n".join([*body, "ret;"]), [*sources, found], threads=threads)
    return found


def _pointer(parameter: int, nbytes: int) -> str:
    """%rd61: of this thread's element of an array."""
    return f"ld.param.u64 %rd60, [k_{parameter}];\nmad.wide.u32 %rd61, %r60, {nbytes}, %rd60;"
