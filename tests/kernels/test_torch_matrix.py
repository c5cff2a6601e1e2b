"""Arrays of a matrix on a device: what does not fit is refused, what is in them is measured."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tests.kernels.torch_expansions import expanded, tile_of_escapes
from tierd_kernels import KernelError, PackedMatrix, torch_expand
from tierd_kernels.torch_matrix import from_arrays, measured

Matrices = Callable[..., PackedMatrix]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: {"codec": "dense"}, "codec 'dense' is not one of raw, exponent-packed"),
        (lambda m: {"dtype": "I8"}, "dtype 'I8' is not one of BF16, F16, F32"),
        (lambda m: {"rows": -1}, r"shape \[-1, 200\] is not in 0..4294967231"),
        (lambda m: {"rows": 2**32 - 65, "cols": 2**32 - 65}, "above the limit of"),
        (lambda m: {"rows": 200}, r"bitmap has 6144 bytes, \[200, 200\] needs 8192"),
        (lambda m: {"heads": None}, "arrays bitmap, offsets, values, codec exponent-packed has"),
        (lambda m: {"scales": m.offsets}, "arrays .*scales.*, codec exponent-packed has"),
        (lambda m: {"offsets": m.offsets[:-4]}, "offsets has 48 bytes, .* needs 52"),
        (lambda m: {"values": m.values[:-1]}, "values has .* multiples of 16"),
        (lambda m: {"values": m.values.view(torch.int8)}, "values is torch.int8"),
        (lambda m: {"values": m.values.view(-1, 2)}, "uint8, one dimension, contiguous"),
        (lambda m: {"values": m.values[::2]}, "uint8, one dimension, contiguous"),
        (lambda m: {"heads": m.heads.to("meta")}, "heads is on meta, values is on "),
        (
            lambda m: {"heads": torch.cat([m.heads, m.heads])[1:49]},
            "heads does not start on a multiple of 4 bytes",
        ),
        (lambda m: {"rows": 0, "cols": 0, "bitmap": m.bitmap[:0]}, "heads has|offsets has"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(
    device: torch.device, random_packed: Matrices, change: Callable[[Any], Any], text: str
) -> None:
    there = from_arrays(random_packed(0, 130, 200, "BF16", ("exponent-packed", True)), device)
    wrong = replace(there, **change(there))
    out = torch.empty(130, 200, dtype=torch.bfloat16, device=device)
    with pytest.raises(KernelError, match=text):
        torch_expand.expand(wrong, out)


def test_a_group_that_is_no_multiple_of_a_tile_is_refused(
    device: torch.device, random_packed: Matrices
) -> None:
    there = from_arrays(random_packed(0, 130, 200, "BF16", ("int8", True)), device)
    with pytest.raises(KernelError, match="group of 63 columns is not a positive multiple of 64"):
        expanded(replace(there, group=63))


def test_values_of_a_matrix_without_tiles_are_refused(device: torch.device) -> None:
    empty = np.zeros(0, np.uint64)
    values = np.zeros(8, np.uint16)
    matrix = PackedMatrix("raw", "BF16", 0, 5, empty, np.zeros(1, np.uint32), values)
    with pytest.raises(KernelError, match=r"values has 16 bytes, \[0, 5\] has no tiles"):
        expanded(from_arrays(matrix, device))


def test_more_planes_or_escapes_than_were_measured_are_a_fault_and_not_read(
    device: torch.device, random_packed: Matrices
) -> None:
    matrix = random_packed(2, 130, 200, "BF16", ("exponent-packed", False))
    there = from_arrays(matrix, device)
    found = measured(there)
    assert found.most_planes > 0
    assert found.most_escapes > 0
    for less in (replace(found, most_planes=0), replace(found, most_escapes=0)):
        with pytest.raises(KernelError, match="its head cannot be"):
            expanded(less)


def test_measuring_takes_heads_that_cannot_be(device: torch.device) -> None:
    matrix = tile_of_escapes([1], [0])
    heads = np.array([0xFFFFFFFF], np.uint32)
    found = measured(from_arrays(replace(matrix, heads=heads), device))
    assert (found.most_planes, found.most_escapes) == (8, 4096)
    with pytest.raises(KernelError, match="tile 0: its head cannot be"):
        expanded(found)


def test_importing_the_kernels_imports_no_torch() -> None:
    text = "import sys, tierd_kernels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", text], check=False).returncode == 0
