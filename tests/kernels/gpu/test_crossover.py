"""The best plan is measured once for each kind of matrix, kept, and never trusted blindly."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tierd_kernels import KernelError, PackedMatrix
from tierd_kernels.errors import WrongKernel
from tierd_kernels.gpu import cuda_product
from tierd_kernels.gpu.crossover import TOKEN_CLASSES, Crossovers, decide, kind
from tierd_kernels.gpu.crossover_file import CrossoverFile, Table
from tierd_kernels.gpu.linear import processors
from tierd_kernels.gpu.plans import CUDA, VARIANTS, Plan, default_plan
from tierd_kernels.torch_matrix import TorchMatrix, from_arrays

Matrices = Callable[..., PackedMatrix]

LEFT, RIGHT = Plan(16, 1, *VARIANTS[0]), Plan(16, 4, *VARIANTS[0])
"""Plans of two orders."""


class PlayedTimer:
    """Says what it is told to, and runs nothing. fused_until: from more tokens expanding is faster.

    Plans with more splits are faster.
    """

    def __init__(self, fused_until: int) -> None:
        self.fused_until = fused_until
        self.calls: list[tuple[Plan | None, int]] = []

    def __call__(self, plan: Plan | None, tokens: int, run: Callable[[], object]) -> float:
        self.calls.append((plan, tokens))
        if plan is None:
            return 0.1
        seconds = 0.5 if tokens <= self.fused_until else 2.0
        return seconds / (8 + plan.splits)


class PlayedTrial:
    """Of a card whose kernels are right, but for those of one plan's tokens."""

    def __init__(self, matrix: TorchMatrix, wrong: int = 0) -> None:
        self.wrong = wrong

    def expansion(self) -> None:
        """It is right."""

    def product(self, plan: Plan) -> None:
        if plan.tokens == self.wrong:
            raise WrongKernel(f"{plan.tokens} tokens at once")


class RunningTimer(PlayedTimer):
    """As `PlayedTimer`, but runs what it is given."""

    def __call__(self, plan: Plan | None, tokens: int, run: Callable[[], object]) -> float:
        run()
        return super().__call__(plan, tokens, run)


@pytest.fixture
def matrix(device: torch.device, random_packed: Matrices) -> TorchMatrix:
    return from_arrays(random_packed(1, 64, 130, "BF16", ("raw", True)), device)


def crossovers(device: torch.device, timer: PlayedTimer, folder: Path) -> Crossovers:
    return Crossovers(device, timer, folder / "cache" / "card.json", PlayedTrial)


def test_few_tokens_are_fused_and_more_are_expanded(
    device: torch.device, matrix: TorchMatrix, tmp_path: Path
) -> None:
    found = crossovers(device, PlayedTimer(fused_until=8), tmp_path)
    for tokens in (1, 2, 3, 5, 8):
        plan = found.choice(matrix, tokens)
        assert plan is not None
        assert plan.tokens >= tokens
        assert plan.splits == 3  # the fastest
    for tokens in (9, 16, 64, 65, 4096):
        assert found.choice(matrix, tokens) is None


def test_a_kind_of_matrix_is_measured_once_and_then_read_from_the_file(
    device: torch.device, matrix: TorchMatrix, random_packed: Matrices, tmp_path: Path
) -> None:
    timer = PlayedTimer(16)
    first = crossovers(device, timer, tmp_path)
    plan = first.choice(matrix, 4)
    measured = len(timer.calls)
    assert measured
    assert {tokens for _, tokens in timer.calls} == set(TOKEN_CLASSES)
    twin = from_arrays(random_packed(1, 64, 130, "BF16", ("raw", True)), device)
    twin.values.zero_()
    assert kind(twin) == kind(matrix)
    assert first.choice(twin, 4) == plan
    assert len(timer.calls) == measured

    later = crossovers(device, PlayedTimer(0), tmp_path)
    assert later.choice(matrix, 4) == plan
    assert later.table(matrix) == first.table(matrix)
    assert not later._timer.calls  # type: ignore[union-attr]


def test_matrices_of_other_form_shape_or_density_are_other_kinds(
    device: torch.device, random_packed: Matrices
) -> None:
    made = [
        random_packed(1, 64, 130, "BF16", ("int8", True)),
        random_packed(1, 64, 130, "BF16", ("int8", False)),
        random_packed(1, 64, 130, "BF16", ("int8", True), group=64),
        random_packed(1, 64, 130, "F16", ("int8", True)),
        random_packed(1, 64, 131, "BF16", ("int8", True)),
        random_packed(1, 64, 130, "BF16", ("int8", True), 0.1),
    ]
    assert len({kind(from_arrays(matrix, device)) for matrix in made}) == len(made)


def test_matrices_of_one_form_of_which_some_have_a_kernel_in_cuda_are_two_kinds(
    matrix: TorchMatrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of exponent-packed those with few planes: what one was measured with the other cannot run."""
    monkeypatch.setattr(cuda_product, "usable", lambda one: one is matrix)
    assert kind(matrix) == kind(replace(matrix)) + " cuda"


def test_what_is_timed_are_the_products_themselves(
    device: torch.device, matrix: TorchMatrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierd_kernels.gpu import crossover

    ran: list[Any] = []
    monkeypatch.setattr(crossover, "linear", lambda *_, plan, **__: ran.append(plan))
    monkeypatch.setattr(crossover, "expand", lambda *_, **__: ran.append(None))
    timer = RunningTimer(16)
    crossovers(device, timer, tmp_path).choice(matrix, 1)
    assert ran == [plan for plan, _ in timer.calls]


def test_a_wrong_tile_is_named_before_its_times_are_kept(
    device: torch.device, random_packed: Matrices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tierd_kernels.gpu import crossover

    monkeypatch.setattr(crossover, "TOKEN_CLASSES", (1,))
    monkeypatch.setattr(crossover, "candidates", lambda *_: [RIGHT])
    packed = random_packed(1, 64, 300, "BF16", ("raw", True))
    packed.offsets[1] += 1
    found = crossovers(device, RunningTimer(16), tmp_path)
    with (
        np.errstate(all="ignore"),
        pytest.raises(KernelError, match="tile 0: offsets do not fit its record"),
    ):
        found.choice(from_arrays(packed, device), 1)
    assert not (tmp_path / "cache").exists()


def test_a_kernel_that_is_wrong_on_this_card_is_not_measured_nor_anything_kept(
    device: torch.device, matrix: TorchMatrix, tmp_path: Path
) -> None:
    timer, path = PlayedTimer(64), tmp_path / "cache" / "card.json"
    found = Crossovers(device, timer, path, lambda matrix: PlayedTrial(matrix, wrong=64))
    for _ in range(2):
        with pytest.raises(WrongKernel, match="64 tokens"):
            found.choice(matrix, 1)
    assert not timer.calls
    assert not path.exists()


def test_without_memory_to_measure_few_tokens_are_fused_and_it_is_said_once(
    device: torch.device, matrix: TorchMatrix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class FullGpu(PlayedTimer):
        def __call__(self, plan: Plan | None, tokens: int, run: Callable[[], object]) -> float:
            super().__call__(plan, tokens, run)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB.")

    timer = FullGpu(0)
    found = crossovers(device, timer, tmp_path)
    for _ in range(2):
        assert found.choice(matrix, 16) == default_plan(matrix.grid, 16, processors(device))
        assert found.choice(matrix, 17) is None
    assert len(timer.calls) == 1
    assert len(caplog.records) == 1
    assert "Tried to allocate 256.00 MiB" in caplog.text
    assert not (tmp_path / "cache").exists()


def test_nothing_is_measured_for_what_has_no_fused_product(
    device: torch.device, random_packed: Matrices, tmp_path: Path
) -> None:
    timer = PlayedTimer(64)
    found = crossovers(device, timer, tmp_path)
    for rows, cols, dtype in ((64, 64, "F32"), (0, 64, "BF16"), (64, 0, "BF16")):
        matrix = from_arrays(random_packed(1, rows, cols, dtype, ("raw", True)), device)
        assert found.choice(matrix, 1) is None
    assert not timer.calls


# ---------------------------------------------------------------- deciding


def table(seconds: Callable[[int], tuple[float, float, float]]) -> Table:
    """Of the seconds of LEFT, RIGHT and expanding for so many tokens."""
    return {n: dict(zip((LEFT, RIGHT, None), seconds(n), strict=True)) for n in TOKEN_CLASSES}


def test_all_plans_of_a_matrix_share_one_order() -> None:
    """RIGHT is faster for most numbers of tokens, but LEFT for those that decode."""
    plans = decide(table(lambda n: (1.0, 1.5 if n in (1, 16) else 0.9, 9.0)))
    assert set(plans.values()) == {LEFT}


def test_fused_ends_with_the_first_number_of_tokens_for_which_it_is_not_faster() -> None:
    """One measurement beyond it that says otherwise is chance, and does not bring it back."""
    plans = decide(table(lambda n: (1.0, 2.0, {8: 1.0, 32: 9.0}.get(n, 1.1))))
    assert [n for n, plan in plans.items() if plan] == [1, 2, 4]


def test_a_matrix_that_is_never_faster_fused_is_always_expanded() -> None:
    assert set(decide(table(lambda _: (1.0, 2.0, 0.5))).values()) == {None}


@pytest.mark.parametrize(("seconds", "taken"), [(0.95, VARIANTS[0]), (0.9, CUDA)])
def test_a_kernel_in_cuda_is_taken_where_it_is_faster_by_a_tenth(
    seconds: float, taken: tuple[int, int, str]
) -> None:
    measured: Table = {
        n: {LEFT: 1.0, Plan(16, 1, *CUDA): seconds, None: 9.0} for n in TOKEN_CLASSES
    }
    assert set(decide(measured).values()) == {Plan(16, 1, *taken)}


def test_a_kernel_in_cuda_is_measured_where_it_runs_and_then_read_from_the_file(
    device: torch.device, random_packed: Matrices, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, one with CuPy and one without, do not measure over each other's times."""
    matrix = from_arrays(random_packed(1, 64, 130, "BF16", ("exponent-packed", True)), device)
    path = tmp_path / "cache" / "card.json"
    timer = PlayedTimer(64)
    without = crossovers(device, timer, tmp_path).table(matrix)
    monkeypatch.setattr(cuda_product, "usable", lambda _: True)
    found = crossovers(device, timer, tmp_path).table(matrix)
    there = {plan for times in found.values() for plan in times if plan and plan.cuda}
    assert {plan.tokens for plan in there} == {16, 32, 64}
    assert found.keys() == without.keys()
    monkeypatch.undo()
    assert CrossoverFile(path).read() == {kind(matrix): without, f"{kind(matrix)} cuda": found}


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"[" * 200_000,
        b'{"format": "tierd-crossovers-0", "tables": {}}',
        b'{"format": "tierd-crossovers-1"}',
        b'{"format": "tierd-crossovers-1", "tables": {"k": {"1": [[null, 0.0]]}}}',
        b'{"format": "tierd-crossovers-1", "tables": {"k": {"1": [[null, NaN]]}}}',
        b'{"format": "tierd-crossovers-1", "tables": {"k": {"x": []}}}',
        b'{"format": "tierd-crossovers-1", "tables": {"k": {"1": [[[16, 0, 4, 1, "v"], 1.0]]}}}',
        b'{"format": "tierd-crossovers-1", "tables": {"k": {"1": [[[16, 1, 5, 1, "v"], 1.0]]}}}',
        b'{"format": "tierd-crossovers-1", "tables": {"k": {"1": [[[16, 1], 1.0]]}}}',
    ],
)
def test_a_bad_file_is_named_measured_again_and_replaced(
    device: torch.device,
    matrix: TorchMatrix,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes,
) -> None:
    path = tmp_path / "cache" / "card.json"
    path.parent.mkdir()
    path.write_bytes(content)
    timer = PlayedTimer(4)
    assert crossovers(device, timer, tmp_path).choice(matrix, 4) is not None
    assert timer.calls
    assert f"{path} is not used, measuring again" in caplog.text
    assert kind(matrix) in json.loads(path.read_bytes())["tables"]


def without_a_class(table: Table) -> None:
    del table[8]


def without_expanding(table: Table) -> None:
    del table[8][None]


def with_more_splits_than_columns(table: Table) -> None:
    plan = next(plan for plan in table[8] if plan)
    table[8][replace(plan, splits=4)] = table[8].pop(plan)


@pytest.mark.parametrize(
    "change", [without_a_class, without_expanding, with_more_splits_than_columns]
)
def test_a_table_that_is_not_what_would_be_measured_is_measured_again(
    device: torch.device, matrix: TorchMatrix, tmp_path: Path, change: Callable[[Table], None]
) -> None:
    kept = crossovers(device, PlayedTimer(16), tmp_path).table(matrix)
    change(kept)
    CrossoverFile(tmp_path / "cache" / "card.json").add(kind(matrix), kept)
    timer = PlayedTimer(4)
    plan = crossovers(device, timer, tmp_path).choice(matrix, 4)
    assert timer.calls
    assert plan is not None
    assert plan.splits <= 3


def test_a_cache_that_cannot_be_written_is_said_and_the_choice_made(
    device: torch.device, matrix: TorchMatrix, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert crossovers(device, PlayedTimer(4), tmp_path).choice(matrix, 4) is not None
    assert "is not written, every process measures" in caplog.text


def test_who_has_no_home_measures_and_keeps_nothing(
    device: torch.device,
    matrix: TorchMatrix,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert Crossovers(device, PlayedTimer(16), trial=PlayedTrial).choice(matrix, 4) is not None
    assert "nowhere to keep what is measured on" in caplog.text


def test_without_a_gpu_or_a_timer_nothing_can_be_measured() -> None:
    with pytest.raises(KernelError, match="measured on a GPU, not on cpu"):
        Crossovers("cpu")
