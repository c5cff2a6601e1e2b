"""What the benchmarks of GPU kernels run on, and matrices in more places than its cache holds.

TIERD_BENCH_DEVICE=memfd tries them out on the CPU, on small matrices, with Triton's interpreter:
that counts for no row.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from tierd_kernels import torch_matrix
from tierd_tools import matrix_set
from tierd_tools.device_clock import CudaClock, HostClock
from tierd_tools.gpu_ground import ground

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_kernels.torch_matrix import TorchMatrix
    from tierd_tools.device_clock import Clock

HOST: Final = torch.device("cpu")
SHAPES: Final = ((8192, 8192), (28672, 8192))
"""[rows, cols], as the promises name them."""
SMALL_SHAPES: Final = ((128, 192), (192, 128))
BY_INTERPRETER: Final = "computed by Triton's interpreter on small matrices, not by a GPU"
CACHES: Final = 4
"""How many times the L2 cache is gone through before a byte is read again."""


@dataclass(frozen=True, slots=True)
class KernelGround:
    """problem: why nothing can be measured. but: why what is measured does not count."""

    problem: str | None
    but: str | None = None
    device: torch.device = HOST
    clock: Clock = HostClock()  # noqa: RUF009  # it has no state
    shapes: tuple[tuple[int, int], ...] = ()
    least_bytes: int = 1
    """What one side goes through before it comes to the same matrix again."""


def kernel_ground() -> KernelGround:
    here = ground()
    if here.problem:
        return KernelGround(here.problem)
    if importlib.util.find_spec("triton") is None:
        return KernelGround("Triton is not installed")
    if here.but is not None:
        if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
            return KernelGround("Triton was imported to compile: TRITON_INTERPRET=1 is needed")
        os.environ["TRITON_INTERPRET"] = "1"
        return KernelGround(None, BY_INTERPRETER, shapes=SMALL_SHAPES)
    device = torch.device("cuda", torch.cuda.current_device())
    properties: Any = torch.cuda.get_device_properties(device)
    return KernelGround(
        None, None, device, CudaClock(), SHAPES, CACHES * int(properties.L2_cache_size)
    )


def dense_weights(here: KernelGround, shape: tuple[int, int], sparsity: float) -> torch.Tensor:
    """Normally distributed bf16 weights on the host, the smallest ones zero."""
    if here.device.type == "cpu":
        return matrix_set.random_dense(*shape, sparsity)
    generator = torch.Generator(here.device).manual_seed(shape[0])
    weights = torch.randn(shape, generator=generator, device=here.device).mul_(0.02)
    return matrix_set.pruned(weights.to(torch.bfloat16).cpu(), sparsity)


def packed_there(here: KernelGround, dense: torch.Tensor, codec: str) -> TorchMatrix:
    """The matrix on the device, as `matrix_set.pack` makes it."""
    matrix = torch_matrix.from_arrays(matrix_set.pack(dense, codec), here.device)
    return torch_matrix.measured(matrix)


def copies_of(here: KernelGround, matrix: TorchMatrix) -> list[TorchMatrix]:
    """So many that together they are `least_bytes` or more, and at least two."""
    count = max(2, -(-here.least_bytes // packed_bytes(matrix)))
    return [matrix, *(_copy(matrix) for _ in range(count - 1))]


def dense_copies(here: KernelGround, dense: torch.Tensor) -> list[torch.Tensor]:
    """Likewise, of a dense matrix of the host."""
    count = max(2, -(-here.least_bytes // dense.nbytes))
    there = dense.to(here.device)
    return [there.clone() for _ in range(count)]


def packed_bytes(matrix: TorchMatrix) -> int:
    return sum(array.numel() for array in matrix.arrays().values())


def over_all(items: list[Any], call: Callable[[Any], object]) -> Callable[[], None]:
    """A side: the call for each of the items, one after the other."""

    def run() -> None:
        for item in items:
            call(item)

    return run


def _copy(matrix: TorchMatrix) -> TorchMatrix:
    parts: dict[str, Any] = {name: array.clone() for name, array in matrix.arrays().items()}
    return replace(matrix, **parts)
