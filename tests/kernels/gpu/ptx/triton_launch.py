"""Triton's launches, compiled for a processor that is not here and run by the machine.

Only where TRITON_INTERPRET is not set: there Triton has nothing to compile.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import torch
import triton.language as tl

from tests.kernels.gpu.ptx import machine
from tests.kernels.gpu.ptx.memory import Array
from tierd_kernels.gpu import arrays
from tierd_kernels.gpu.compiled import compiling_for

if TYPE_CHECKING:
    from collections.abc import Iterator

WRITTEN: Final = frozenset({"out", "parts", "faults"})
"""Parameters of our kernels that are written to."""


@contextmanager
def launches_on(architecture: int) -> Iterator[None]:
    """Within, every launch is compiled for it (80, 90, 100) and run here, on arrays of the CPU."""

    def run_here(
        function: Any, made: Any, grid: Any, arguments: tuple[Any, ...], warmup: bool
    ) -> None:
        if not warmup:
            launch_compiled(made, grid, function.arg_names, arguments)

    # The host's checks shall want arrays of the CPU.
    interpreted = patch.object(arrays, "INTERPRETED", tl.constexpr(True))
    new_nan = patch.object(torch.Tensor, "new_empty", _new_nan)
    with compiling_for(architecture, run_here), interpreted, new_nan:
        yield


def _new_nan(tensor: torch.Tensor, shape: Any, **options: Any) -> torch.Tensor:
    """As `new_empty`; what nobody writes to afterwards is seen."""
    return tensor.new_full(shape, torch.nan, **options)


def launch_compiled(made: Any, grid: Any, names: list[str], arguments: tuple[Any, ...]) -> None:
    """Run what Triton compiled. names: of the parameters, the constants behind `arguments`.

    What Triton made a constant of (None, 1, tl.constexpr) is no parameter of the PTX; behind the
    others it has two pointers to scratch memory, which our kernels do not have.
    """
    given = dict(zip(names, arguments, strict=False))
    values: list[Any] = []
    given_arrays = []
    for name, kind in made.src.signature.items():
        if kind == "constexpr":
            continue
        value = given[name]
        if isinstance(value, torch.Tensor):
            given_arrays.append(array(name, value, name in WRITTEN))
            value = value.data_ptr()
        values.append(value)
    assert not made.metadata.global_scratch_size
    kernel = machine.kernel(made.asm["ptx"])
    scratch = [0] * (len(kernel.entry.parameters) - len(values))
    threads = 32 * made.metadata.num_warps
    machine.launch(kernel, grid, threads, [*values, *scratch], given_arrays, made.metadata.shared)


def array(name: str, tensor: torch.Tensor, written: bool) -> Array:
    """The bytes from its first element to its last one."""
    extent = 0
    if tensor.numel():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        extent = (sum((n - 1) * stride for n, stride in steps) + 1) * tensor.itemsize
    return Array(name, tensor.data_ptr(), extent, written)
