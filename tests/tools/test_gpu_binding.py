"""What binds a kernel: bytes, instructions, or neither, by two floors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from tierd_kernels import torch_matrix
from tierd_tools import gpu_binding, matrix_set
from tierd_tools.gpu_binding import Binding, bound_by, counted
from tierd_tools.gpu_launches import Launched
from tierd_tools.gpu_matrices import KernelGround

if TYPE_CHECKING:
    from pathlib import Path

    from tierd_kernels.torch_matrix import TorchMatrix

KERNEL = Launched("expand_tiles", 4, 32, 1024, 0, 16)
SLOTS_PER_S = 4 * 132 * 2e9


@pytest.fixture
def matrix() -> TorchMatrix:
    dense = torch.eye(128, 64, dtype=torch.bfloat16)
    return torch_matrix.from_arrays(matrix_set.pack(dense, "raw"))


def said(slots: int | None, seconds: float) -> str:
    """Of 90 MB where a copy moves 2 TB/s: a floor of 45 us."""
    return Binding((KERNEL,), 64, SLOTS_PER_S, slots).text(90_000_000, seconds, 2e12)


def test_what_is_near_the_rate_of_a_copy_is_bound_by_bytes() -> None:
    text = said(20_000_000, 50e-6)
    assert text.startswith(
        "bytes: 90.0 MB in 50.0 us, 90% of what a copy moves; 20.0 M issue slots"
    )
    assert "38% of the card's in that time; expand_tiles: 32 registers" in text


def test_what_uses_up_the_issue_slots_is_bound_by_instructions() -> None:
    assert said(90_000_000, 90e-6).startswith("instructions: ")


def test_what_is_far_from_both_waits() -> None:
    assert said(20_000_000, 90e-6).startswith("waiting: ")


def test_slots_that_nobody_counted_are_not_made_up() -> None:
    assert "issue slots were not counted" in said(None, 50e-6)


def test_an_interpreter_compiles_nothing(matrix: TorchMatrix) -> None:
    called = []
    binding = bound_by(KernelGround(None), lambda: called.append(1), matrix, None)
    assert called == [1]
    assert "no kernel was compiled" in binding.text(1, 1.0, 1.0)


def test_issue_slots_are_those_of_the_record_for_every_tile(
    matrix: TorchMatrix, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tierd_kernels.gpu.expand import DEFAULT_WAY

    monkeypatch.setattr(gpu_binding, "RECORDS", tmp_path / "resources.json")
    assert counted(matrix, DEFAULT_WAY, 90) is None
    way = f"{DEFAULT_WAY.variant}-{DEFAULT_WAY.warps}warps"
    name = f"expand/raw-masked/BF16/{way}/sm_90"
    (tmp_path / "resources.json").write_text(json.dumps({name: {"issue_slots": 1980}}))
    assert counted(matrix, DEFAULT_WAY, 90) == 2 * 1980
    assert counted(matrix, DEFAULT_WAY, 80) is None
