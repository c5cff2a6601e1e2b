"""Equal matrices, dense and packed, in enough different places that no cache keeps them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from tierd_kernels import encode

if TYPE_CHECKING:
    from tierd_kernels import PackedMatrix

GROUP = 128


@dataclass(frozen=True, slots=True)
class MatrixSet:
    """dense: the weights in bf16. packed: the same weights; for int8 and int4 rounded to levels.

    A cache knows addresses, not contents: copies count as different matrices.
    """

    dense: list[torch.Tensor]
    packed: list[PackedMatrix]

    @property
    def dense_bytes(self) -> int:
        return sum(matrix.nbytes for matrix in self.dense)


def random_dense(rows: int, cols: int, sparsity: float) -> torch.Tensor:
    """Normally distributed bf16 weights, the smallest ones zero."""
    generator = torch.Generator().manual_seed(rows)
    dense = torch.randn(rows, cols, generator=generator).mul_(0.02).to(torch.bfloat16)
    return pruned(dense, sparsity)


def pruned(dense: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The same tensor of bf16 weights, its smallest ones set to zero."""
    encode.prune_magnitude(dense.view(torch.uint16).numpy(), "BF16", sparsity)
    return dense


def pack(dense: torch.Tensor, codec: str) -> PackedMatrix:
    """Masked, as what has zeros is packed."""
    bits = dense.view(torch.uint16).numpy()
    match codec:
        case "raw":
            return encode.encode_raw(bits, "BF16")
        case "exponent-packed":
            return encode.encode_exponent(bits, "BF16", masked=True)
        case _:
            return encode.quantise(bits, "BF16", codec=codec, group=GROUP, masked=True)


def matrix_set(dense: torch.Tensor, codec: str, least_bytes: int) -> MatrixSet:
    """As many copies as make the packed ones, and so the dense ones, `least_bytes` or more."""
    packed = pack(dense, codec)
    count = -(-least_bytes // min(packed.nbytes, dense.nbytes))
    return MatrixSet(
        dense=[dense.clone() for _ in range(count)], packed=[_copy(packed) for _ in range(count)]
    )


def _copy(matrix: PackedMatrix) -> PackedMatrix:
    arrays: dict[str, Any] = {name: array.copy() for name, array in matrix.arrays().items()}
    return replace(matrix, **arrays)
