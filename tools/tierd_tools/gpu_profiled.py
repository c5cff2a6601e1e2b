"""What the profiler watches: each kernel of the promises once, on a matrix of 8192 x 8192 in bf16.

python -m tierd_tools.gpu_profiled
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from tierd_kernels.faults import new_faults
from tierd_tools.gpu_matrices import dense_weights, kernel_ground, packed_there

if TYPE_CHECKING:
    from tierd_tools.gpu_matrices import KernelGround

KERNELS: Final = "expand_tiles|multiply_tiles"
"""Of expanding, and of the fused product (its sum of parts is small)."""
CASES: Final = (
    *(("expand", "raw"), ("expand", "exponent-packed")),
    *(("fused", "raw"), ("fused", "exponent-packed"), ("fused", "int8"), ("fused", "int4")),
)
SPARSITY: Final = 0.5


def launch(here: KernelGround) -> int:
    """Launches one kernel for each case; returns how many."""
    from tierd_kernels.gpu.expand import expand
    from tierd_kernels.gpu.linear import linear

    dense = dense_weights(here, here.shapes[0], SPARSITY)
    faults = new_faults(here.device)
    out = torch.empty(dense.shape, dtype=dense.dtype, device=here.device)
    x = torch.randn(1, dense.shape[1]).to(dense.dtype).to(here.device)
    for way, codec in CASES:
        matrix = packed_there(here, dense, codec)
        if way == "expand":
            expand(matrix, out, faults=faults)
        else:
            linear(matrix, x, faults=faults)
    return len(CASES)


if __name__ == "__main__":
    launch(kernel_ground())
    torch.cuda.synchronize()
