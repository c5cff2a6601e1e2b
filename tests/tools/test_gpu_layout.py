"""A matrix whose tiles or elements are stored in another order is read back as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tierd_kernels import torch_matrix
from tierd_kernels.gpu.records import far_units
from tierd_tools import gpu_layout, matrix_set

SHAPES = {"rows": (128, 192), "columns": (128, 192), "squares": (256, 512), "blocks": (128, 64)}

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here: no interpreter"
)


def stored(order: str) -> tuple[torch.Tensor, Any]:
    """A matrix, and its pack in the order."""
    dense = matrix_set.random_dense(*SHAPES[order], 0.5)
    copy = gpu_layout.stored_copy(dense, order)
    return dense, torch_matrix.from_arrays(matrix_set.pack(copy, "raw"))


@pytest.mark.parametrize("order", gpu_layout.ORDERS)
def test_expanding_puts_the_elements_back(order: str) -> None:
    dense, matrix = stored(order)
    tall, wide = (length // 64 for length in dense.shape)
    out = torch.full_like(dense, 7.0)
    gpu_layout.expand_tiles[(tall * wide,)](
        matrix.bitmap, matrix.offsets, matrix.values, matrix.values.numel(),
        far_units(matrix.values.numel()), out, tall, wide, VARIANT="gather", ORDER=order,
    )  # fmt: skip
    assert torch.equal(out, dense)


@pytest.mark.parametrize("order", ["rows", "columns", "blocks"])
def test_sums_are_those_of_the_matrix(order: str) -> None:
    dense, matrix = stored(order)
    tall, wide = (length // 64 for length in dense.shape)
    x = torch.randn(dense.shape[1]).to(torch.bfloat16)
    parts = torch.full((2, dense.shape[0]), 7.0)
    gpu_layout.sum_rows[(tall, 2)](
        matrix.bitmap, matrix.offsets, matrix.values, matrix.values.numel(),
        far_units(matrix.values.numel()), x, parts, tall, wide, 2, VARIANT="gather", ORDER=order,
    )  # fmt: skip
    torch.testing.assert_close(parts.sum(0), dense.float() @ x.float())


@pytest.mark.parametrize("order", gpu_layout.ORDERS)
def test_every_order_but_that_on_disk_moves_something(order: str) -> None:
    dense = matrix_set.random_dense(*SHAPES[order], 0.5)
    copy = gpu_layout.stored_copy(dense, order)
    assert torch.equal(copy, dense) == (order == "rows")
    assert torch.equal(copy.view(torch.int16).sort().values.sum(), dense.view(torch.int16).sum())


PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tierd_tools import gpu_layout, gpu_planted
packed = {"bitmap": "*u8", "offsets": "*u8", "values": "*u8"}
packed |= {"values_bytes": "i64", "far_units": "i64"}
size = {"tall": "i32", "wide": "i32"}
for order in ("rows", "blocks"):
    chosen = {"VARIANT": "window", "ORDER": order}
    fixed = dict.fromkeys(chosen, "constexpr")
    for kernel, rest in (
        (gpu_layout.expand_tiles, {"out": "*bf16", **size}),
        (gpu_layout.sum_rows, {"x": "*bf16", "parts": "*fp32", **size, "splits": "i32"}),
    ):
        source = ASTSource(kernel, {**packed, **rest, **fixed}, chosen)
        print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
source = ASTSource(gpu_planted.write_past, {"out": "*fp32", "elements": "i32"}, {})
print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def test_they_compile_for_an_h100() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
