"""Who is compared with whom, and when a run counts as having the same tokens."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from tierd_tools import pack, random_model, unpack
from tierd_tools.bench import peers
from tierd_tools.checkpoint import Checkpoint
from tierd_tools.demo.model_processes import WorkerFailed
from tierd_tools.demo.rows import Row
from tierd_tools.peers import comparison
from tierd_tools.peers.comparison import ACCELERATE, LLAMA, TRANSFORMERS

if TYPE_CHECKING:
    from pathlib import Path

RAW = comparison.tierd_name("raw", "fused")


def row(seconds: float, **more: Any) -> Row:
    plain = Row(
        name="x",
        clients=1,
        compute="fused",
        threads_per_client=2,
        cap_bytes=100,
        seconds_per_token=seconds,
        tokens_per_second=1 / seconds,
        ssd_bytes_per_token=None,
        stall_share=None,
        peak_memory_bytes=None,
        page_cache_bytes=None,
        binding_stage="ssd",
        tokens_equal=True,
    )
    return dataclasses.replace(plain, **more)


def runs() -> peers.Runs:
    return {
        ACCELERATE: [row(4.0)],
        TRANSFORMERS: [row(3.0), row(3.0), row(3.0)],
        LLAMA: [row(1.0), row(2.0), row(9.0)],
        peers.OURS: [row(0.5), row(0.1), row(0.25)],
        RAW: [row(1.0)],
    }


def test_ours_is_held_against_the_best_of_the_others_by_medians() -> None:
    ours, raw, *others = peers.judge(runs(), "", 6.0, None)
    assert LLAMA in ours.row
    assert (ours.ratio, ours.met) == (8.0, True)
    assert (raw.ratio, raw.met) == (2.0, None), "the bound is that of lossless"
    assert {other.ratio for other in others} == {12.0, 16.0}


def test_a_missing_peer_leaves_the_bound_unjudged_with_the_reason() -> None:
    ours, *_ = peers.judge(runs(), "", 6.0, "llama-cpp-python is not installed")
    assert ours.met is None
    assert ours.as_json()["reason"] == "llama-cpp-python is not installed"


def test_of_two_runs_the_slower_stands() -> None:
    assert comparison.middle([row(1.0), row(2.0)]).seconds_per_token == 2.0


@pytest.mark.parametrize(("gap", "same"), [(None, False), (0.03, True), (0.5, False)])
def test_other_tokens_count_as_the_same_only_from_a_near_tie_on(
    gap: float | None, same: bool
) -> None:
    other = row(1.0, tokens_equal=False, first_difference=3, reference_gap=gap)
    assert comparison.same_tokens(other) is same
    assert comparison.same_tokens(row(1.0))


def test_a_budget_that_was_exceeded_and_other_tokens_are_seen() -> None:
    table = runs()
    table[RAW] = [row(1.0, dram_peak_bytes=101, tokens_equal=False, reference_gap=0.5)]
    tokens, budget = peers.promises(table, {}, 100)
    assert tokens.met is False
    assert budget.met is False


def test_contenders_run_in_every_round_and_the_others_once() -> None:
    calls: list[str] = []

    def once(name: str) -> Row:
        calls.append(name)
        return row(1.0)

    systems = {name: partial(once, name) for name in (ACCELERATE, LLAMA, peers.OURS)}
    counted = {name: len(repeats) for name, repeats in peers.measure(systems, {}).items()}
    assert counted == {ACCELERATE: 1, LLAMA: peers.ROUNDS, peers.OURS: peers.ROUNDS}
    assert calls[:5] == [ACCELERATE, LLAMA, peers.OURS, LLAMA, peers.OURS], "they take turns"


def test_a_peer_that_dies_is_left_out_with_what_it_said_and_tierd_is_not() -> None:
    def dies() -> Row:
        raise WorkerFailed("ended with -9")

    failed: peers.Failures = {}
    counted = peers.measure({LLAMA: dies, peers.OURS: lambda: row(1.0)}, failed)
    assert list(counted) == [peers.OURS]
    assert failed == {LLAMA: "ended with -9"}
    with pytest.raises(WorkerFailed):
        peers.measure({peers.OURS: dies}, {})


def test_a_checkpoint_cut_by_layer_has_the_same_tensors(tmp_path: Path) -> None:
    model_dir, packed, whole = tmp_path / "model", tmp_path / "pack", tmp_path / "whole"
    random_model.write(model_dir, random_model.TINY)
    pack.pack(model_dir, packed, prune="magnitude", sparsity=0.5)
    unpack.unpack(packed, whole)
    before = {n: t.read().tobytes() for n, t in Checkpoint.open(whole).tensors.items()}
    comparison.shard_by_layer(whole)
    after = {n: t.read().tobytes() for n, t in Checkpoint.open(whole).tensors.items()}
    assert after == before
    files = set(
        json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"].values()
    )
    assert len(files) == 4, "embedding, norm, and two decoder layers"
    assert {file.name for file in whole.glob("*.safetensors")} == files
