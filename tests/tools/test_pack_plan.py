from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tierd_tools import pack_plan
from tierd_tools.checkpoint import Checkpoint
from tierd_tools.pack_plan import is_prunable, may_be_compressed, plan
from tierd_tools.pack_settings import Settings
from tierd_tools.source_tensor import FileTensor


def tensor(name: str, dtype: str = "BF16", shape: tuple[int, ...] = (4, 4)) -> FileTensor:
    return FileTensor(name, dtype, shape, Path("x"), 0, 32)


def test_layers_come_in_the_order_in_which_a_decoder_uses_them(
    tmp_path: Path, checkpoints: Any
) -> None:
    one = ("BF16", (1,), b"xx")
    names = [
        *("embed_out.bias", "lm_head.bias", "model.norm.weight", "model.rotary_emb.inv_freq"),
        *(f"model.layers.{i}.mlp.up.weight" for i in range(11)),
        *("model.embed_tokens.weight", "wpe.weight"),
        *("model.embed_positions.weight", "scale"),
    ]
    folder = checkpoints.write(tmp_path / "m", dict.fromkeys(names, one))
    the_plan = plan(Checkpoint.open(folder), Settings())
    assert [layer.name for shard in the_plan.shards for layer in shard] == [
        *("model.embed_positions", "model.embed_tokens", "wpe"),
        *(f"model.layers.{i}" for i in range(11)),
        *("model.norm", "model.rotary_emb", "scale"),
        *("embed_out", "lm_head"),
    ]


def test_matrices_that_the_checkpoint_stores_twice_become_aliases(
    tmp_path: Path, checkpoints: Any
) -> None:
    matrix = ("BF16", (2, 2), b"12345678")
    folder = checkpoints.write(
        tmp_path / "m",
        {
            "lm_head.weight": matrix,
            "model.embed_tokens.weight": matrix,
            "model.other.weight": ("BF16", (2, 2), b"1234567-"),
            "model.reshaped.weight": ("BF16", (1, 4), b"12345678"),
            "model.layers.0.a.weight": matrix,
            "model.layers.1.a.weight": matrix,
            "model.norm.weight": ("BF16", (4,), b"12345678"),
            "model.norm2.weight": ("BF16", (4,), b"12345678"),
        },
    )
    the_plan = plan(Checkpoint.open(folder), Settings())
    assert the_plan.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head" not in [layer.name for shard in the_plan.shards for layer in shard]


def test_a_shard_ends_before_it_gets_too_large(
    tmp_path: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_plan, "SHARD_BYTES", 100)
    sizes = [60, 40, 2, 300, 98, 4]
    tensors = {f"a.{i}.w": ("U8", (n,), bytes(n)) for i, n in enumerate(sizes)}
    folder = checkpoints.write(tmp_path / "m", tensors)
    shards = plan(Checkpoint.open(folder), Settings()).shards
    assert [[layer.source_bytes for layer in s] for s in shards] == [
        [60, 40],
        [2],
        [300],
        [98],
        [4],
    ]


@pytest.mark.parametrize(
    ("prunable", "name", "dtype", "shape"),
    [
        (True, "model.layers.0.mlp.up_proj.weight", "BF16", (4, 4)),
        (True, "transformer.h.11.attn.c_attn.weight", "F32", (2, 4)),
        (True, "model.layers.0.mlp.experts.3.w1.weight", "F16", (4, 4)),
        (False, "model.layers.0.mlp.gate.weight", "BF16", (4, 4)),
        (False, "model.layers.0.block_sparse_moe.router.layer.weight", "BF16", (4, 4)),
        (False, "model.layers.0.mlp.up_proj.bias", "BF16", (4, 4)),
        (False, "model.layers.0.mlp.up_proj.weight", "BF16", (16,)),
        (False, "model.layers.0.mlp.experts.weight", "BF16", (1, 4, 4)),
        (False, "model.layers.0.mlp.up_proj.weight", "I64", (2, 2)),
        (False, "model.layers.0.mlp.up_proj.weight", "F64", (2, 2)),
        (False, "model.layers.0.input_layernorm.weight", "BF16", (4, 4)),
        (False, "block.0.layer.relative_attention_bias.weight", "BF16", (4, 4)),
        (False, "model.embed_tokens.weight", "BF16", (4, 4)),
        (False, "lm_head.weight", "BF16", (4, 4)),
    ],
)
def test_only_matrices_of_linear_layers_in_numbered_layers_are_pruned(
    prunable: bool, name: str, dtype: str, shape: tuple[int, ...]
) -> None:
    assert is_prunable(tensor(name, dtype, shape)) is prunable


def test_a_matrix_that_is_not_prunable_may_still_be_stored_sparse() -> None:
    assert may_be_compressed(tensor("model.layers.0.mask"))
    assert not may_be_compressed(tensor("lm_head.weight"))


def test_the_estimate_follows_the_zeros_and_the_sparsity(tmp_path: Path, checkpoints: Any) -> None:
    tensors = checkpoints.llama(layers=2, size=256)
    checkpoint = Checkpoint.open(checkpoints.write(tmp_path / "m", tensors))
    for settings, least, most in (
        (Settings.check(codec="raw"), 1.0, 1.0),
        (Settings.check(codec="raw", prune="magnitude", sparsity=0.5), 0.55, 0.62),
        (Settings.check(), 0.70, 0.78),
        (Settings.check(prune="magnitude", sparsity=0.5), 0.38, 0.47),
        (Settings.check(codec="int8"), 0.50, 0.58),
        (Settings.check(codec="int4", prune="magnitude", sparsity=0.5), 0.19, 0.28),
    ):
        the_plan = plan(checkpoint, settings)
        estimated = the_plan.estimated_bytes / the_plan.source_bytes
        assert least <= estimated <= most, settings
        assert the_plan.prunable == 2 * 5
