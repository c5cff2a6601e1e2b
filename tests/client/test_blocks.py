from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import tierd_kernels
from tierd_client import blocks, compute
from tierd_client.blocks import block_rows, blocked_product
from tierd_client.scratch import Scratch
from tierd_client.tensors import torch_dtype
from tierd_layouts import packed_matrix
from tierd_layouts.packed_matrix import PackedMatrix, encode_raw

ROWS, COLS = 300, 70


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 rows for each thread."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 64 * COLS * 2)


def packed(dtype: str) -> tuple[PackedMatrix, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLS, generator=generator)
    weight[torch.rand(ROWS, COLS, generator=generator) < 0.5] = 0
    weight = weight.to(torch_dtype(dtype))
    unsigned = torch.uint32 if dtype == "F32" else torch.uint16
    return encode_raw(weight.view(unsigned).numpy(), dtype), weight


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_row_is_multiplied_whatever_the_blocks(dtype: str, threads: int) -> None:
    torch.manual_seed(2)
    matrix, weight = packed(dtype)
    x = torch.randn(37, COLS).to(weight.dtype)
    bias = torch.randn(ROWS).to(weight.dtype)
    exact = x.double() @ weight.double().t()
    for part in (None, bias):
        got = blocked_product(matrix, x, part, threads=threads)
        wanted = exact if part is None else exact + part.double()
        assert got.is_contiguous()
        assert (got.dtype, got.shape) == (weight.dtype, (37, ROWS))
        rounding = torch.finfo(weight.dtype).eps
        assert torch.allclose(got.double(), wanted, rtol=2 * rounding, atol=80 * rounding)


@pytest.mark.usefixtures("small_blocks")
def test_each_block_is_expanded_once_and_multiplied_by_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix, _ = packed("BF16")
    expanded: list[tuple[int, int]] = []
    multiplied: list[int] = []
    expand, mm = tierd_kernels.expand, torch.mm

    def note_expand(matrix: Any, out: Any, *, tile_rows: Any, threads: int) -> None:
        assert threads == 2
        expanded.append(tile_rows)
        expand(matrix, out, tile_rows=tile_rows, threads=threads)

    def note_mm(block: torch.Tensor, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        multiplied.append(block.shape[0])
        return mm(block, x, out=out)

    monkeypatch.setattr(tierd_kernels, "expand", note_expand)
    monkeypatch.setattr(torch, "mm", note_mm)
    scratch = Scratch()
    blocked_product(matrix, torch.ones(3, COLS).bfloat16(), scratch=scratch, threads=2)
    assert expanded == [(0, 2), (2, 4), (4, 5)]
    assert multiplied == [128, 128, 44]
    assert scratch.nbytes == 128 * COLS * 2, "the scratch is a block, not the matrix"


def test_a_matrix_without_rows_or_tokens_has_a_product() -> None:
    matrix, weight = packed("BF16")
    assert blocked_product(matrix, weight[:0]).shape == (0, ROWS)
    empty = encode_raw(np.zeros((0, COLS), np.uint16), "BF16")
    assert blocked_product(empty, weight[:5]).shape == (5, 0)
    narrow = encode_raw(np.zeros((ROWS, 0), np.uint16), "BF16")
    product = blocked_product(narrow, torch.ones(5, 0).bfloat16())
    assert torch.equal(product, torch.zeros(5, ROWS).bfloat16())


def test_it_records_no_gradient() -> None:
    matrix, _ = packed("F32")
    bias = torch.ones(ROWS, requires_grad=True)
    assert not blocked_product(matrix, torch.ones(2, COLS), bias).requires_grad


def test_a_lossy_codec_is_rounded_to_the_dtype_in_blocks() -> None:
    from tierd_layouts import quantised

    _, weight = packed("BF16")
    bits = weight.view(torch.uint16).numpy()
    matrix = quantised.encode(bits, "BF16", codec="int4", group=64, masked=True)
    rounded = torch.from_numpy(packed_matrix.decode(matrix)).view(torch.bfloat16)
    x = torch.randn(20, COLS).bfloat16()
    got, wanted = blocked_product(matrix, x), functional.linear(x, rounded)
    assert torch.allclose(got, wanted, rtol=2**-7, atol=2**-9)
    unrounded = functional.linear(x.float(), torch.from_numpy(quantised.weights(matrix)))
    assert (got - wanted).abs().sum() < (unrounded - wanted).abs().sum()


@pytest.mark.parametrize(
    ("cols", "item_bytes", "threads", "rows"),
    [
        (4096, 2, 1, 256),
        (4096, 2, 2, 512),
        (11008, 2, 2, 128),
        (1 << 20, 4, 3, 192),  # one tile row for each thread is the least
        (64, 2, 1, 16384),
    ],
)
def test_a_block_has_whole_tile_rows_for_every_thread(
    cols: int, item_bytes: int, threads: int, rows: int
) -> None:
    assert block_rows(cols, item_bytes, threads) == rows
    assert rows % (64 * threads) == 0


def test_the_benchmark_finds_it_beside_the_other_ways_to_compute() -> None:
    assert compute.blocked_product is blocked_product
