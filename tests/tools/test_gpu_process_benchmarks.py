"""The benchmarks of the GPU tier that run model processes, with shared memory in place of a GPU:
they measure what they should, and count for nothing. Minutes where other work runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tierd_tools import random_model
from tierd_tools.bench import gpu_decode, gpu_killed, gpu_shared, gpu_token
from tierd_tools.gpu_acceptance import models
from tierd_tools.gpu_acceptance.promises import BESIDE, SHARED

if TYPE_CHECKING:
    from pathlib import Path

    from tierd_tools.benchmark import Row

pytestmark = pytest.mark.slow
SHAPE = random_model.Shape(
    hidden=256, intermediate=512, layers=4, heads=4, kv_heads=4, vocabulary=1000
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of the acceptance, small."""
    folder = tmp_path_factory.mktemp("models")
    random_model.write(folder / "given" / "llama", SHAPE)
    models.prepare(folder, folder / "given")
    return folder


@pytest.fixture(autouse=True)
def _memfd(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIERD_BENCH_DEVICE", "memfd")
    monkeypatch.setenv("TIERD_GPU_MODELS", str(folder))
    monkeypatch.chdir(tmp_path)


def measured(rows: list[Row], count: int) -> list[Row]:
    assert len(rows) == count
    assert {row.met for row in rows} == {None}
    assert all("not on a GPU" in str(row.not_applicable) for row in rows)
    return rows


def test_slots_of_a_client_that_is_killed_while_it_computes_are_reused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_killed, "LAYER_BYTES", 1 << 20)
    monkeypatch.setattr(gpu_killed, "ROOM_BYTES", 8 << 20)
    monkeypatch.setattr(gpu_killed, "PASSES", 5)
    reused, logits = measured(gpu_killed.run(), 2)
    assert reused.ours is not None
    assert 0 < reused.ours < gpu_killed.PATIENCE_S
    assert logits.ours == 1.0, "the logits of another client changed when one was killed"


def test_tokens_and_logits_are_those_of_the_model_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_token, "TOKENS", 4)
    monkeypatch.setattr(gpu_token, "ROUNDS", 1)
    less, whole, tokens, logits = measured(gpu_token.run(), 4)
    assert less.ours is not None
    assert whole.ours is not None
    assert 0 < less.ours <= whole.ours
    assert (tokens.ours, logits.ours) == (1.0, 1.0)


def test_processes_share_one_copy_that_was_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_shared, "COUNTS", (1, 2))
    monkeypatch.setattr(gpu_shared, "SHARED", SHARED[:2])
    monkeypatch.setattr(gpu_shared, "BESIDE", BESIDE[:1])
    arenas, read, _ = gpu_shared.run()
    assert arenas.ratio == 1.0
    assert read.ratio is not None
    assert read.ratio <= 1.05


def test_tokens_are_made_through_small_tiers_and_by_accelerate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_decode, "STEPS", 1)
    monkeypatch.setattr(gpu_decode, "ROUNDS", 1)
    rows = measured(gpu_decode.run(), 4)
    assert all(row.ours and row.theirs for row in rows)
    assert "(0 MB read a token against" in rows[0].row
    assert "(0 MB read a token against" not in rows[2].row
