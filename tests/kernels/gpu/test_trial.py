"""A kernel that computes something else than it should is found before it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.kernels.random_matrices import TAME
from tierd_kernels import PackedMatrix
from tierd_kernels.errors import WrongKernel
from tierd_kernels.gpu import trial
from tierd_kernels.gpu.expand import expand
from tierd_kernels.gpu.linear import linear
from tierd_kernels.gpu.plans import VARIANTS, Plan
from tierd_kernels.gpu.trial import Trial
from tierd_kernels.torch_matrix import from_arrays

Matrices = Callable[..., PackedMatrix]

PLAN = Plan(16, 2, *VARIANTS[0])


@pytest.mark.parametrize("codec", ["raw", "exponent-packed", "int8", "int4"])
def test_right_kernels_pass(device: torch.device, random_packed: Matrices, codec: str) -> None:
    matrix = from_arrays(random_packed(1, 200, 130, "BF16", (codec, True), tops=TAME), device)
    Trial(matrix).expansion()
    Trial(matrix).product(PLAN)


def test_a_tile_that_is_wrong_is_no_fault_of_the_kernels(
    device: torch.device, random_packed: Matrices
) -> None:
    packed = random_packed(1, 64, 130, "BF16", ("raw", True), tops=TAME)
    packed.offsets[1] += 1
    Trial(from_arrays(packed, device)).expansion()
    Trial(from_arrays(packed, device)).product(PLAN)


@pytest.mark.parametrize("row", [0, 70, 199])
def test_one_wrong_bit_of_an_expansion_is_found(
    device: torch.device, random_packed: Matrices, monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    def expand_wrongly(matrix: Any, out: torch.Tensor, *, tile_rows: Any, faults: Any) -> None:
        expand(matrix, out, tile_rows=tile_rows, faults=faults)
        if tile_rows[0] == row // 64:
            out.view(torch.int16)[row % 64, 100] ^= 1

    monkeypatch.setattr(trial, "expand", expand_wrongly)
    matrix = from_arrays(random_packed(1, 200, 130, "BF16", ("raw", True), tops=TAME), device)
    with pytest.raises(WrongKernel, match=rf"tile row {row // 64} .* raw matrix \[200, 130\]"):
        Trial(matrix).expansion()


@pytest.mark.parametrize("wrong", ["two elements change places", "a token is another", "NaN"])
def test_a_wrong_product_is_found(
    device: torch.device, random_packed: Matrices, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def multiply_wrongly(matrix: Any, x: torch.Tensor, *, out: torch.Tensor, **named: Any) -> None:
        if wrong == "two elements change places":
            x = x[:, torch.tensor([1, 0, *range(2, x.shape[1])], device=x.device)]
        elif wrong == "a token is another":
            x = x[[1, *range(1, len(x))]]
        linear(matrix, x, out=out, **named)
        if wrong == "NaN":
            out[2, 64] = float("nan")

    monkeypatch.setattr(trial, "linear", multiply_wrongly)
    matrix = from_arrays(random_packed(1, 200, 130, "BF16", ("int8", True), tops=TAME), device)
    with pytest.raises(WrongKernel, match=r"multiplies wrongly on .*: off by \S+, 1e-04 at most"):
        Trial(matrix).product(PLAN)


def test_an_element_in_the_wrong_place_of_a_long_row_is_far_above_the_bound(
    device: torch.device,
) -> None:
    """What MOST_ERROR says of 8192 columns."""
    torch.manual_seed(1)
    x, weights = (torch.randn(16, 8192, dtype=torch.float64, device=device) for _ in range(2))
    moved = weights.clone()
    moved[3, [5, 6]] = moved[3, [6, 5]]
    assert trial._error((x @ moved.T).float(), x, weights) > 30 * trial.MOST_ERROR
    assert trial._error((x @ weights.T).float(), x, weights) < trial.MOST_ERROR / 30
