"""Is the fused product of one token faster than torch's dense bf16 linear?

Both sides run over the same set of different matrices, more than the last-level cache holds, with
the same number of threads. Expanding is compared with copying the dense bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

import tierd_kernels
from tierd_layouts import packed_matrix
from tierd_tools.benchmark import Row, interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tierd_layouts.packed_matrix import PackedMatrix

SHAPES = ((4096, 4096), (11008, 4096))
SPARSITY = 0.5
#: Around the number of tokens up to which the client multiplies fused.
CROSSOVER_TOKENS = (8, 16, 32)
#: The dense set is at least this large: 8 times a 32 MiB last-level cache.
SET_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Matrix:
    dense: torch.Tensor
    packed: PackedMatrix


def _matrices(rows: int, cols: int) -> list[Matrix]:
    generator = torch.Generator().manual_seed(rows)
    count = max(4, -(-SET_BYTES // (rows * cols * 2)))
    matrices = []
    for _ in range(count):
        dense = torch.randn(rows, cols, generator=generator)
        dense[torch.rand(rows, cols, generator=generator) < SPARSITY] = 0
        dense = dense.to(torch.bfloat16)
        bits = dense.view(torch.uint16).numpy()
        matrices.append(Matrix(dense, packed_matrix.encode_raw(bits, "BF16")))
    return matrices


def run() -> list[Row]:
    before = torch.get_num_threads()
    try:
        return list(_rows())
    finally:
        torch.set_num_threads(before)


def _rows() -> Iterator[Row]:
    for rows, cols in SHAPES:
        matrices = _matrices(rows, cols)
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            torch.set_num_threads(threads)
            yield _fused(matrices, rows, cols, threads)
            yield _expand(matrices, rows, cols, threads)
        for tokens in CROSSOVER_TOKENS:
            yield _crossover(matrices, rows, cols, tokens, threads)


def _fused(matrices: list[Matrix], rows: int, cols: int, threads: int) -> Row:
    x = torch.randn(1, cols).to(torch.bfloat16)

    def theirs() -> None:
        for m in matrices:
            F.linear(x, m.dense)

    return _compare(
        f"fused raw {rows}x{cols}, 1 token, {threads} threads, against torch bf16 linear",
        matrices,
        _multiply_fused(matrices, x, threads),
        theirs,
        at_least=0.5,
    )


def _expand(matrices: list[Matrix], rows: int, cols: int, threads: int) -> Row:
    out = np.empty((rows, cols), np.uint16)
    target = torch.from_numpy(out.view(np.int16))

    def ours() -> None:
        for m in matrices:
            tierd_kernels.expand(m.packed, out, threads=threads)

    def theirs() -> None:
        for m in matrices:
            target.copy_(m.dense.view(torch.int16))

    return _compare(
        f"expand raw {rows}x{cols}, {threads} threads, against a copy of the dense bytes",
        matrices,
        ours,
        theirs,
    )


def _crossover(matrices: list[Matrix], rows: int, cols: int, tokens: int, threads: int) -> Row:
    x = torch.randn(tokens, cols).to(torch.bfloat16)
    scratch = torch.empty(rows, cols, dtype=torch.bfloat16)
    scratch_bits = scratch.view(torch.uint16).numpy()

    def theirs() -> None:
        for m in matrices:
            tierd_kernels.expand(m.packed, scratch_bits, threads=threads)
            F.linear(x, scratch)

    return _compare(
        f"fused raw {rows}x{cols}, {tokens} tokens, against expanding first",
        matrices,
        _multiply_fused(matrices, x, threads),
        theirs,
    )


def _multiply_fused(matrices: list[Matrix], x: torch.Tensor, threads: int) -> Callable[[], None]:
    bits = x.view(torch.uint16).numpy()
    out = np.empty((x.shape[0], matrices[0].dense.shape[0]), np.float32)

    def multiply() -> None:
        for m in matrices:
            tierd_kernels.linear(m.packed, bits, out, threads=threads)

    return multiply


def _compare(
    row: str,
    matrices: list[Matrix],
    ours: Callable[[], None],
    theirs: Callable[[], None],
    at_least: float | None = None,
) -> Row:
    """Both sides over all matrices, in dense bytes per second."""
    seconds = interleaved({"ours": ours, "theirs": theirs}, rounds=9)
    dense_bytes = sum(m.dense.nbytes for m in matrices)
    return Row(
        row=row,
        ours=dense_bytes / seconds["ours"] / 1e9,
        theirs=dense_bytes / seconds["theirs"] / 1e9,
        unit="dense GB/s",
        at_least=at_least,
    )
