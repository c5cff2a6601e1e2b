from __future__ import annotations

import pytest

from tierd_tools.errors import BadSetting
from tierd_tools.sparsity import Sparsities, is_linear, is_router, matches

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
GATE = "model.layers.1.mlp.gate.weight"


@pytest.mark.parametrize(
    ("matched", "pattern", "name"),
    [
        (True, "model.layers.0", UP),
        (False, "model.layers.0", "model.layers.01.mlp.up_proj.weight"),
        (True, "*.up_proj", UP),
        (True, "*.up_proj.weight", UP),
        (True, "model.layers.[0-3].mlp", UP),
        (False, "up_proj", UP),  # a pattern covers a whole name
        (False, "MODEL.*", UP),
        (True, "*", "lm_head.weight"),
    ],
)
def test_a_pattern_covers_a_whole_tensor_or_module_name(
    matched: bool, pattern: str, name: str
) -> None:
    assert matches(name, pattern) is matched


def test_the_last_exception_that_matches_counts_and_keep_wins_over_all() -> None:
    sparsities = Sparsities.parse(
        0.5, ["*.mlp=0.6", "model.layers.1=0.7", "*.down_proj=0.2"], ["model.layers.2"]
    )
    assert sparsities.of(UP) == 0.6
    assert sparsities.of(DOWN) == 0.2
    assert sparsities.of("model.layers.1.self_attn.q_proj.weight") == 0.7
    assert sparsities.of("model.layers.0.self_attn.q_proj.weight") == 0.5
    assert sparsities.of("model.layers.2.mlp.up_proj.weight") == 0.0
    assert sparsities.keeps("model.layers.2.mlp.up_proj.weight")
    assert not sparsities.keeps(UP)


def test_what_is_no_linear_weight_of_a_numbered_layer_is_never_pruned() -> None:
    sparsities = Sparsities.parse(0.5, ["*=0.9"])
    for name in (
        *("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.bias"),
        *("model.layers.0.input_layernorm.weight", "block.0.relative_attention_bias.weight"),
    ):
        assert not is_linear(name)
        assert sparsities.of(name) == 0.0


@pytest.mark.parametrize(
    "name",
    [
        GATE,
        "model.layers.1.mlp.shared_expert_gate.weight",
        "model.layers.1.block_sparse_moe.gate.weight",
        "model.layers.1.mlp.router.weight",
        "encoder.block.1.layer.1.mlp.router.classifier.weight",
        "transformer.blocks.1.ffn.router.layer.weight",
    ],
)
def test_router_gates_are_pruned_only_when_they_are_named(name: str) -> None:
    assert is_router(name)
    assert Sparsities.parse(0.5).of(name) == 0.0
    assert Sparsities.parse(0.5, [f"{name}=0.25"]).of(name) == 0.25


def test_a_gated_projection_is_no_router() -> None:
    for name in ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.gate_up_proj.weight"):
        assert not is_router(name)
        assert Sparsities.parse(0.5).of(name) == 0.5


def test_without_a_default_only_what_is_named_is_pruned() -> None:
    sparsities = Sparsities.parse(None, ["*.down_proj=0.5"])
    assert sparsities.of(DOWN) == 0.5
    assert sparsities.of(UP) == 0.0


@pytest.mark.parametrize(
    ("exception", "text"),
    [
        ("0.5", "'0.5' is not PATTERN=S"),
        ("=0.5", "'=0.5' is not PATTERN=S"),
        ("*.up_proj=", "'' is not a number"),
        ("*.up_proj=half", "'half' is not a number"),
        ("*.up_proj=1.0", r"'\*\.up_proj=1\.0': sparsity 1\.0 is outside \[0, 1\)"),
        ("*.up_proj=nan", "nan is outside"),
    ],
)
def test_an_exception_that_says_nothing_usable_is_refused_by_its_text(
    exception: str, text: str
) -> None:
    with pytest.raises(BadSetting, match=text):
        Sparsities.parse(0.5, [exception])


def test_a_pattern_that_matches_nothing_is_refused_as_a_typing_error() -> None:
    names = [UP, DOWN, "lm_head.weight"]
    Sparsities.parse(0.5, ["*.up_proj=0.6"], ["lm_head"]).refuse_unmatched(names)
    with pytest.raises(BadSetting, match=r"sparsity-of '\*\.up' matches none of the 2 linear"):
        Sparsities.parse(0.5, ["*.up=0.6"]).refuse_unmatched(names)
    with pytest.raises(BadSetting, match=r"sparsity-of 'lm_head' matches none"):
        Sparsities.parse(0.5, ["lm_head=0.6"]).refuse_unmatched(names)
    with pytest.raises(BadSetting, match=r"keep 'head' matches none of the 3 tensors \(one of th"):
        Sparsities.parse(0.5, (), ["head"]).refuse_unmatched(names)
    with pytest.raises(BadSetting, match="keep '' is no pattern"):
        Sparsities.parse(0.5, (), [""])


def test_the_text_tells_different_settings_apart() -> None:
    settings = [
        Sparsities.parse(0.5),
        Sparsities.parse(0.25),
        Sparsities.parse(0.5, ["a=0.25"]),
        Sparsities.parse(0.5, ["a=0.25", "b=0.5"]),
        Sparsities.parse(0.5, (), ["a"]),
        Sparsities.parse(),
    ]
    texts = [sparsities.text() for sparsities in settings]
    assert len(set(texts)) == len(texts)
    assert texts[0] == "--sparsity 0.5"
    assert texts[3] == "--sparsity 0.5 --sparsity-of a=0.25 --sparsity-of b=0.5"
