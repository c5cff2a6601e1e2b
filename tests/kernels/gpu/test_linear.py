"""The fused product is the exact one, rounded once, for every form, shape and number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.kernels.gpu.products import error, exact, numbers, single
from tests.kernels.random_matrices import TAME
from tierd_kernels import KernelError, PackedMatrix, reference
from tierd_kernels.faults import NO_FAULT, fault_text, new_faults
from tierd_kernels.gpu.linear import linear
from tierd_kernels.gpu.plans import VARIANTS, Plan, candidates
from tierd_kernels.torch_matrix import DTYPES, from_arrays, measured

Matrices = Callable[..., PackedMatrix]
Bits = Callable[..., Any]

MOST_ERROR = 1e-5
"""RMS of the error relative to the RMS of the exact product."""
LOSSLESS = [("raw", True), ("exponent-packed", True), ("exponent-packed", False)]
PLAN = Plan(16, 2, *VARIANTS[0])


@pytest.fixture(autouse=True)
def infinities() -> Iterator[None]:
    """As on a GPU, numbers that are none are no reason for a warning; the interpreter is numpy."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_the_sum_before_the_rounding_is_exact_within_the_promise(
    device: torch.device,
    random_packed: Matrices,
    random_x: Bits,
    form: tuple[str, bool],
    dtype: str,
) -> None:
    matrix = random_packed(3, 130, 200, dtype, form, tops=TAME)
    x = numbers(random_x(1, 5, 200, dtype), dtype, device)
    bias = numbers(random_x(2, 1, 130, dtype), dtype, device)[0]
    there = measured(from_arrays(matrix, device))
    ours = linear(there, x, bias, out=single(130, 5, device))
    assert error(ours, exact(matrix, x) + bias.double().cpu().numpy()) < MOST_ERROR / 10


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("form", LOSSLESS[:2], ids=["raw", "packed"])
def test_the_rounded_result_is_as_near_as_that_of_a_dense_product(
    device: torch.device,
    packed_weights: Matrices,
    random_x: Bits,
    form: tuple[str, bool],
    dtype: str,
) -> None:
    matrix = packed_weights(form, 5, 128, 320, dtype)
    x = numbers(random_x(3, 16, 320, dtype), dtype, device)
    weights = torch.from_numpy(reference.weights(matrix)).to(DTYPES[dtype]).to(device)
    ours = linear(from_arrays(matrix, device), x)
    assert ours.dtype == DTYPES[dtype]
    exactly = exact(matrix, x)
    assert error(ours, exactly) <= 1.05 * error(functional.linear(x, weights), exactly)


def test_levels_are_multiplied_unrounded(
    device: torch.device, packed_weights: Matrices, random_x: Bits
) -> None:
    """A product with the expanded weights, which are rounded to bfloat16, is a worse one."""
    matrix = packed_weights(("int8", True), 5, 64, 256, "BF16")
    x = numbers(random_x(3, 4, 256, "BF16"), "BF16", device)
    ours = linear(from_arrays(matrix, device), x, out=single(64, 4, device))
    rounded = torch.from_numpy(reference.weights(matrix)).bfloat16().double().numpy()
    theirs = torch.from_numpy(x.double().cpu().numpy() @ rounded.T)
    assert error(ours, exact(matrix, x)) < error(theirs, exact(matrix, x)) / 100


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 33, 64])
def test_every_number_of_tokens_up_to_64_is_multiplied(
    device: torch.device, random_packed: Matrices, random_x: Bits, tokens: int
) -> None:
    matrix = random_packed(tokens, 70, 130, "BF16", ("raw", True), tops=TAME)
    x = numbers(random_x(tokens, tokens, 130, "BF16"), "BF16", device)
    ours = linear(from_arrays(matrix, device), x, out=single(70, tokens, device))
    assert error(ours, exact(matrix, x)) < MOST_ERROR / 10


@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (63, 65), (65, 63), (64, 64), (1, 330), (200, 1), (0, 70), (70, 0)]
)
def test_every_shape_is_multiplied(
    device: torch.device, random_packed: Matrices, random_x: Bits, rows: int, cols: int
) -> None:
    for seed, form in enumerate([("raw", True), ("int4", True), ("exponent-packed", False)]):
        matrix = random_packed(seed, rows, cols, "BF16", form, tops=TAME)
        x = numbers(random_x(seed, 3, cols, "BF16"), "BF16", device)
        bias = numbers(random_x(2, 1, rows, "BF16"), "BF16", device)[0]
        ours = linear(from_arrays(matrix, device), x, bias, out=single(rows, 3, device))
        size = x.abs().double().cpu().numpy() @ np.abs(reference.weights(matrix)).T
        size += bias.abs().double().cpu().numpy()
        exactly = exact(matrix, x) + bias.double().cpu().numpy()
        assert (np.abs(ours.cpu().numpy() - exactly) <= 400 * 2.0**-24 * size).all(), form


@pytest.mark.parametrize("group", [64, 192, 64 * (2**31 - 1), 2**70])
def test_every_group_has_its_own_scales(
    device: torch.device, random_packed: Matrices, random_x: Bits, group: int
) -> None:
    """One may be wider than the matrix, and than a number of 32 bits."""
    matrix = random_packed(3, 64, 450, "BF16", ("int8", False), group=group, tops=TAME)
    x = numbers(random_x(3, 2, 450, "BF16"), "BF16", device)
    for splits in (1, 5):
        plan = replace(PLAN, splits=splits)
        ours = linear(from_arrays(matrix, device), x, out=single(64, 2, device), plan=plan)
        assert error(ours, exact(matrix, x)) < MOST_ERROR / 10


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_empty_and_full_tiles_are_multiplied(
    device: torch.device, packed_weights: Matrices, random_x: Bits, density: float
) -> None:
    matrix = packed_weights(("raw", True), 8, 64, 128, "BF16", density)
    x = numbers(random_x(3, 2, 128, "BF16"), "BF16", device)
    ours = linear(from_arrays(matrix, device), x, out=single(64, 2, device))
    np.testing.assert_allclose(ours.cpu().numpy(), exact(matrix, x), rtol=1e-4, atol=1e-6)


def test_every_plan_that_can_be_chosen_gives_the_product(
    device: torch.device, random_packed: Matrices, random_x: Bits
) -> None:
    """And those of one order give the same bits, for any number of tokens at once."""
    matrix = random_packed(4, 64, 140, "F16", ("raw", True), tops=TAME)
    there = from_arrays(matrix, device)
    x = numbers(random_x(4, 3, 140, "F16"), "F16", device)
    exactly = exact(matrix, x)
    found: dict[tuple[object, ...], torch.Tensor] = {}
    for tokens in (16, 64):
        for plan in candidates(there.grid, "raw", tokens):
            ours = linear(there, x, out=single(64, 3, device), plan=plan)
            assert error(ours, exactly) < MOST_ERROR / 10, plan
            first = found.setdefault(plan.order, ours)
            assert torch.equal(first, ours), plan


def test_a_result_does_not_depend_on_the_other_tokens_nor_on_how_many_there_are(
    device: torch.device, random_packed: Matrices, random_x: Bits
) -> None:
    matrix = from_arrays(random_packed(5, 64, 300, "BF16", ("raw", True), tops=TAME), device)
    x = numbers(random_x(5, 9, 300, "BF16"), "BF16", device)
    together = linear(matrix, x, plan=PLAN)
    for token in (0, 4, 8):
        alone = linear(matrix, x[token : token + 1], plan=PLAN)
        assert torch.equal(alone[0], together[token])
    others = x.clone()
    others[:4] = torch.inf
    assert torch.equal(linear(matrix, others, plan=PLAN)[4:], together[4:])


@pytest.mark.parametrize("form", [("raw", True), ("int8", True)], ids=["raw", "int8"])
def test_an_infinite_x_gives_nan_where_it_meets_a_zero(
    device: torch.device, pack: Matrices, form: tuple[str, bool]
) -> None:
    bits = np.full((64, 70), 0x3F80, np.uint16)
    bits[5, 66] = 0
    x = torch.ones((2, 70), dtype=torch.bfloat16, device=device)
    x[1, 66] = torch.inf
    ours = linear(from_arrays(pack(bits, "BF16", form), device), x).float().cpu()
    assert torch.isfinite(ours[0]).all()
    assert ours[1, 5].isnan()
    assert (ours[1, torch.arange(64) != 5] == torch.inf).all()


def test_the_bias_is_added_before_the_one_rounding(device: torch.device, pack: Matrices) -> None:
    """1 + 2^-9 is 1 in bfloat16, and so would 1 + 2^-8 be, were the sum rounded before."""
    bits = np.zeros((64, 64), np.uint16)
    bits[:, 0], bits[:, 1] = 0x3F80, 0x3B00  # 1 and 2^-9
    x = torch.ones((1, 64), dtype=torch.bfloat16, device=device)
    bias = torch.full((64,), 2.0**-8, dtype=torch.bfloat16, device=device)
    ours = linear(from_arrays(pack(bits, "BF16"), device), x, bias)
    assert (ours == 1 + 2.0**-7).all()


def test_an_output_that_is_given_is_the_result_and_nothing_beside_it_is_written(
    device: torch.device, random_packed: Matrices, random_x: Bits
) -> None:
    matrix = from_arrays(random_packed(6, 70, 64, "BF16", ("raw", True), tops=TAME), device)
    x = numbers(random_x(6, 2, 64, "BF16"), "BF16", device)
    room = torch.full((4, 72), 7.0, dtype=torch.bfloat16, device=device)
    out = room[1:3, 1:71]
    assert linear(matrix, x, out=out) is out
    assert torch.equal(out, linear(matrix, x))
    out.fill_(7.0)
    assert (room == 7.0).all()


def test_rows_of_x_may_lie_apart(
    device: torch.device, random_packed: Matrices, random_x: Bits
) -> None:
    matrix = from_arrays(random_packed(6, 64, 70, "BF16", ("raw", True), tops=TAME), device)
    x = numbers(random_x(6, 6, 70, "BF16"), "BF16", device)
    assert torch.equal(linear(matrix, x[::2]), linear(matrix, x[::2].contiguous()))


# ---------------------------------------------------------------- wrong contents


def test_a_wrong_tile_counts_as_zeros_and_is_named(
    device: torch.device, random_packed: Matrices, random_x: Bits
) -> None:
    matrix = random_packed(9, 130, 130, "BF16", ("raw", True), tops=TAME)
    bits = np.array(matrix.bitmap)
    bits[4 * 64 : 5 * 64] = 0  # its offsets say that it has a record
    bits[5 * 64] |= np.uint64(1 << 63)  # of two columns
    wrong = from_arrays(replace(matrix, bitmap=bits), device)
    weights = reference.weights(matrix)
    weights[64:128, 64:130] = 0
    x = numbers(random_x(6, 2, 130, "BF16"), "BF16", device)
    faults = new_faults(device)
    ours = linear(wrong, x, out=single(130, 2, device), faults=faults)
    assert error(ours, x.double().cpu().numpy() @ weights.T) < MOST_ERROR
    assert fault_text(int(faults)) == "tile 4: offsets do not fit its record"
    with pytest.raises(KernelError, match="tile 4: offsets do not fit its record"):
        linear(wrong, x)


def test_a_cell_stays_empty_while_nothing_is_wrong(
    device: torch.device, random_packed: Matrices
) -> None:
    matrix = from_arrays(random_packed(9, 64, 64, "BF16", ("raw", True)), device)
    faults = new_faults(device)
    linear(matrix, torch.ones((1, 64), dtype=torch.bfloat16, device=device), faults=faults)
    assert int(faults) == NO_FAULT


# ---------------------------------------------------------------- refusals


def test_what_does_not_fit_is_refused(device: torch.device, random_packed: Matrices) -> None:
    matrix = from_arrays(random_packed(1, 70, 130, "BF16", ("raw", True)), device)
    x = torch.ones((2, 130), dtype=torch.bfloat16, device=device)
    single_dtype = from_arrays(random_packed(1, 70, 130, "F32", ("raw", True)), device)
    refused: dict[str, Any] = {
        "dtype F32 has no fused product, BF16, F16 have": (single_dtype, x.float()),
        r"x has dtype torch.float16, torch.bfloat16 is needed": (matrix, x.half()),
        r"x has shape \[65, 130\], \[0..64, 130\] is needed": (matrix, x[:1].expand(65, 130)),
        r"x has shape \[2, 129\]": (matrix, x[:, 1:]),
        "a row's elements must be adjacent": (matrix, x.new_ones((130, 2)).T),
        r"bias is torch.bfloat16\[69\], torch.bfloat16\[70\] is needed": (matrix, x, x[0, :69]),
        r"bias has strides \[2\]": (matrix, x, x.new_ones(140)[::2]),
    }
    for text, arguments in refused.items():
        with pytest.raises(KernelError, match=text):
            linear(*arguments)
    for text, out in {
        r"out has shape \[2, 69\], \[2, 70\] is needed": x.new_empty((2, 69)),
        "out has dtype torch.float16": torch.empty((2, 70), dtype=torch.float16, device=device),
        "out has strides": x.new_empty((70, 2)).T,
    }.items():
        with pytest.raises(KernelError, match=text):
            linear(matrix, x, out=out)
    for text, plan in {
        "a plan for 8 tokens at once": replace(PLAN, tokens=8),
        r"a plan of 4 splits, 130 columns have 1..3": replace(PLAN, splits=4),
        "none of the variants": replace(PLAN, warps=3),
    }.items():
        with pytest.raises(KernelError, match=text):
            linear(matrix, x, plan=plan)
    wide = from_arrays(random_packed(1, 1, 33 * 64, "BF16", ("raw", True)), device)
    with pytest.raises(KernelError, match=r"a plan of 33 splits, 2112 columns have 1..32"):
        linear(wide, x.new_ones((1, 33 * 64)), plan=replace(PLAN, splits=33))


def test_no_tokens_are_no_work(device: torch.device, random_packed: Matrices) -> None:
    matrix = from_arrays(random_packed(1, 70, 130, "BF16", ("raw", True)), device)
    x = torch.ones((0, 130), dtype=torch.bfloat16, device=device)
    assert linear(matrix, x).shape == (0, 70)
