"""How far is the fused product from the exact one, and is that as near as cuBLAS gets?

The exact product is that in float64 of the weights as they are stored: levels times scales for int8
and int4, which are not rounded to bf16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from tierd_kernels import torch_expand
from tierd_tools.gpu_acceptance.promises import ERROR
from tierd_tools.gpu_matrices import dense_weights, kernel_ground, packed_there

if TYPE_CHECKING:
    from tierd_tools.benchmark import Row
    from tierd_tools.gpu_matrices import KernelGround

CODECS = ("raw", "exponent-packed", "int8", "int4")
LIMIT = 1e-5
TOKENS = 16
SHAPE, SMALL = (1024, 16384), (64, 320)


def run() -> list[Row]:
    here = kernel_ground()
    if here.problem:
        return [promise.not_run(here.problem) for promise in ERROR]
    dense = dense_weights(here, SHAPE if here.device.type == "cuda" else SMALL, 0.5)
    x = torch.randn(TOKENS, dense.shape[1]).to(dense.dtype).to(here.device)
    errors = {codec: _errors(here, dense, codec, x) for codec in CODECS}
    promises = iter(ERROR)
    rows = [next(promises).measured(errors[codec][0], LIMIT, here.but) for codec in CODECS]
    return rows + [
        promise.measured(*errors[codec][1:], here.but)
        for codec, promise in zip(CODECS, promises, strict=False)
    ]


def _errors(
    here: KernelGround, dense: torch.Tensor, codec: str, x: torch.Tensor
) -> tuple[float, float, float]:
    """RMS errors, of the exact product's RMS: of the float32 result, of the bf16 one, of cuBLAS."""
    from tierd_kernels.gpu.linear import linear

    matrix = packed_there(here, dense, codec)
    weights = torch.empty(dense.shape, device=here.device)
    if codec in ("int8", "int4"):
        torch_expand.expand(replace(matrix, dtype="F32"), weights)
    else:
        weights.copy_(dense)
    exact = x.double() @ weights.double().T
    summed = linear(matrix, x, out=torch.empty_like(exact, dtype=torch.float32))
    theirs = F.linear(x, weights.to(dense.dtype))

    def rms(result: torch.Tensor) -> float:
        scale = exact.square().mean().sqrt()
        return float((result.double() - exact).square().mean().sqrt() / scale)

    return rms(summed), rms(linear(matrix, x)), rms(theirs)
