"""Are products with packed weights faster than torch's dense bf16 linear, and than any could be?

Both sides run over the same number of matrices, whose bytes, packed ones too, are 8 times the
last-level cache, with the same number of threads, which are torch's. Outputs of an expansion and of
a copy are as many as the matrices: a single one would stay in the cache and favour the copy.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

import tierd_kernels
from tierd_client.blocks import blocked_product
from tierd_client.cores import kernel_threads, processors
from tierd_client.scratch import Scratch
from tierd_kernels import encode
from tierd_tools.bandwidth import last_level_cache, read_bandwidth
from tierd_tools.benchmark import Row, interleaved
from tierd_tools.matrix_set import MatrixSet, matrix_set, random_dense

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from tierd_kernels import PackedMatrix

SHAPES = ((4096, 4096), (11008, 4096))
LEAST_BYTES = 8 * last_level_cache()
ROUNDS = 9
#: codec, zeros, tokens -> at least, with one thread and with two
PRODUCTS = {
    ("raw", 0.5, 1): (2.0, 2.5),
    ("raw", 0.7, 1): (2.2, 2.2),
    ("exponent-packed", 0.5, 1): (1.2, 1.2),
    ("int8", 0.5, 1): (2.2, 2.2),
    ("int4", 0.5, 1): (2.0, 2.0),
    ("raw", 0.5, 8): (1.2, 1.2),
    ("raw", 0.5, 128): (0.9, 0.9),
}
#: Faster than any dense kernel can be.
AGAINST_READING = 1.4
EXPANSIONS = {"raw": 0.9, "exponent-packed": 0.7}
#: Around the number of tokens up to which the client multiplies fused.
CROSSOVER_TOKENS = (16, 32)
#: Columns of the longest row for which the error is promised.
LONGEST = 16384


def run() -> list[Row]:
    return list(_rows())


def _rows() -> Iterator[Row]:
    yield _cores()
    for shape in SHAPES:
        for (codec, sparsity, tokens), bounds in PRODUCTS.items():
            if shape != SHAPES[0] and (codec, sparsity, tokens) != ("raw", 0.5, 1):
                continue
            matrices = matrix_set(random_dense(*shape, sparsity), codec, LEAST_BYTES)
            label = f"{codec} {sparsity:.0%}, {shape[0]}x{shape[1]}, {tokens} tokens"
            for threads, bound in zip((1, 2), bounds, strict=True):
                yield _product(label, matrices, tokens, threads, bound)
            if (codec, sparsity, tokens) == ("raw", 0.5, 1):
                yield _against_reading(label, matrices)
                for count in CROSSOVER_TOKENS if shape == SHAPES[0] else ():
                    yield _crossover(matrices, count, min(2, processors()))
    for codec, bound in EXPANSIONS.items():
        matrices = matrix_set(random_dense(*SHAPES[0], 0.5), codec, LEAST_BYTES)
        for threads in (1, 2):
            yield _expansion(f"expand {codec} 50%, 4096x4096", matrices, threads, bound)
    yield from _errors()


@contextmanager
def _torch_threads(threads: int) -> Iterator[int]:
    """Both sides with this many threads of torch's. Yields what the kernels are to be told."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield kernel_threads(1)
    finally:
        torch.set_num_threads(before)


def _unjudged(row: str, threads: int) -> Row | None:
    if threads <= processors():
        return None
    why = f"{processors()} processors"
    return Row(row, None, None, "dense GB/s", not_applicable=why)


def _product(label: str, matrices: MatrixSet, tokens: int, threads: int, at_least: float) -> Row:
    row = f"{label}, {threads} threads, against torch bf16 linear"
    x = torch.randn(tokens, matrices.dense[0].shape[1]).to(torch.bfloat16)

    def theirs() -> None:
        for dense in matrices.dense:
            F.linear(x, dense)

    with _torch_threads(threads) as allowed:
        ours = (_blocked if tokens > max(CROSSOVER_TOKENS) else _fused)(matrices, x, allowed)
        return _unjudged(row, threads) or _compare(row, matrices, ours, theirs, at_least)


def _against_reading(label: str, matrices: MatrixSet) -> Row:
    threads = processors()
    x = torch.randn(1, matrices.dense[0].shape[1]).to(torch.bfloat16)
    fastest, how = read_bandwidth(threads, LEAST_BYTES)
    with _torch_threads(threads) as allowed:
        seconds = interleaved({"ours": _fused(matrices, x, allowed)}, rounds=ROUNDS)["ours"]
    fastest = max(fastest, read_bandwidth(threads, LEAST_BYTES)[0])
    return Row(
        f"{label}, {threads} threads, against reading the dense bytes ({how})",
        *(matrices.dense_bytes / seconds / 1e9, fastest / 1e9, "dense GB/s"),
        at_least=AGAINST_READING,
    )


def _crossover(matrices: MatrixSet, tokens: int, threads: int) -> Row:
    x = torch.randn(tokens, matrices.dense[0].shape[1]).to(torch.bfloat16)
    with _torch_threads(threads) as allowed:
        return _compare(
            f"raw 50%, 4096x4096, {tokens} tokens, {threads} threads, against its blocks expanded",
            matrices,
            _fused(matrices, x, allowed),
            _blocked(matrices, x, allowed),
        )


def _expansion(label: str, matrices: MatrixSet, threads: int, at_least: float) -> Row:
    row = f"{label}, {threads} threads, against a copy of the dense bytes"
    outputs = [torch.zeros_like(dense) for dense in matrices.dense]
    bits = [output.view(torch.uint16).numpy() for output in outputs]

    def theirs() -> None:
        for output, dense in zip(outputs, matrices.dense, strict=True):
            output.copy_(dense)

    with _torch_threads(threads) as allowed:

        def ours() -> None:
            for output, matrix in zip(bits, matrices.packed, strict=True):
                tierd_kernels.expand(matrix, output, threads=allowed)

        return _unjudged(row, threads) or _compare(row, matrices, ours, theirs, at_least)


def _fused(matrices: MatrixSet, x: torch.Tensor, threads: int) -> Callable[[], None]:
    bits = x.view(torch.uint16).numpy()
    out = np.empty((x.shape[0], matrices.dense[0].shape[0]), np.float32)

    def multiply() -> None:
        for matrix in matrices.packed:
            tierd_kernels.linear(matrix, bits, out, threads=threads)

    return multiply


def _blocked(matrices: MatrixSet, x: torch.Tensor, threads: int) -> Callable[[], None]:
    scratch = Scratch()

    def multiply() -> None:
        for matrix in matrices.packed:
            blocked_product(matrix, x, scratch=scratch, threads=threads)

    return multiply


def _compare(
    row: str,
    matrices: MatrixSet,
    ours: Callable[[], None],
    theirs: Callable[[], None],
    at_least: float | None = None,
) -> Row:
    """Both sides over all matrices, in dense bytes per second."""
    seconds = interleaved({"ours": ours, "theirs": theirs}, rounds=ROUNDS)
    return Row(
        row=row,
        ours=matrices.dense_bytes / seconds["ours"] / 1e9,
        theirs=matrices.dense_bytes / seconds["theirs"] / 1e9,
        unit="dense GB/s",
        at_least=at_least,
    )


def _cores() -> Row:
    """Two processors of a virtual machine may be one core: then two threads compute as one."""
    row = "2 threads against 1 where only arithmetic counts (below 2: they share a core)"
    if processors() < 2:
        return Row(row, None, None, "GFLOP/s", not_applicable="1 processor")
    matrix = encode.encode_raw(random_dense(512, 1024, 0.5).view(torch.uint16).numpy(), "BF16")
    bits = torch.randn(32, 1024).to(torch.bfloat16).view(torch.uint16).numpy()
    out = np.empty((32, 512), np.float32)
    with _torch_threads(2) as allowed:

        def multiply(threads: int) -> Callable[[], None]:
            def repeat() -> None:
                for _ in range(50):
                    tierd_kernels.linear(matrix, bits, out, threads=threads)

            return repeat

        seconds = interleaved({"two": multiply(allowed), "one": multiply(1)}, rounds=ROUNDS)
    flops = 50 * 2 * 32 * 512 * 1024 / 1e9
    return Row(row, flops / seconds["two"], flops / seconds["one"], "GFLOP/s")


def _errors() -> Iterator[Row]:
    """Of the longest rows, relative to the exact product's RMS, before and after rounding."""
    dense = random_dense(1024, LONGEST, 0.5)
    bits = dense.view(torch.uint16).numpy()
    x = torch.randn(8, LONGEST).to(torch.bfloat16)
    exact = x.double() @ dense.double().T
    scale = float(exact.square().mean().sqrt())

    def rms(result: torch.Tensor) -> float:
        return float((result.double() - exact).square().mean().sqrt()) / scale

    for codec in ("raw", "exponent-packed"):
        matrix = encode.encode_raw(bits, "BF16")
        if codec != "raw":
            matrix = encode.encode_exponent(bits, "BF16", masked=True)
        ours = torch.from_numpy(_result(matrix, x))
        label = f"{codec} 50%, {LONGEST} columns"
        yield Row(f"{label}: RMS error, limit 1e-5", rms(ours), 1e-5, "relative", at_most=1.0)
        most = float((ours.double() - exact).abs().max()) / scale
        yield Row(f"{label}: largest error, of the RMS product", most, None, "relative")
        yield Row(
            f"{label}: RMS error in bf16, against torch",
            *(rms(ours.to(torch.bfloat16)), rms(F.linear(x, dense)), "relative"),
            at_most=1.05,
        )


def _result(matrix: PackedMatrix, x: torch.Tensor) -> NDArray[np.float32]:
    out = np.empty((x.shape[0], matrix.rows), np.float32)
    tierd_kernels.linear(matrix, x.view(torch.uint16).numpy(), out)
    return out
