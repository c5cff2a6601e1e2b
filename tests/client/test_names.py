from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
)

from tierd_client.errors import UnsupportedModel
from tierd_client.names import (
    Stored,
    check_loaded,
    is_matrix,
    map_checkpoint,
    placeholders,
    refuse_unfit,
    stored_tensors,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 50}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4}


def skeleton(config: Any) -> Any:
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def stored(name: str, shape: tuple[int, ...], dtype: str = "BF16", layer: int = 0) -> Stored:
    tensor: Any = SimpleNamespace(name=name, shape=shape, dtype=dtype, codec="dense")
    return Stored(layer, tensor)


def checkpoint_of(model: Any) -> dict[str, Stored]:
    """Stored tensors as `save_pretrained` would name them in a model without conversions."""
    tied = set(model.all_tied_weights_keys)
    return {
        name: stored(name, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def load(model: Any, made: Mapping[str, torch.Tensor]) -> tuple[Any, Any]:
    loaded: tuple[Any, Any] = type(model).from_pretrained(
        None, config=model.config, state_dict=dict(made), dtype="auto", output_loading_info=True
    )
    return loaded


@pytest.mark.parametrize(
    ("shape", "matrix"),
    [((), False), ((7,), False), ((1, 7), False), ((1, 1, 7), False), ((2, 2), True)],
)
def test_a_tensor_with_two_sizes_above_one_is_a_matrix(shape: Any, matrix: bool) -> None:
    assert is_matrix(shape) == matrix


def test_an_alias_leads_to_the_tensor_that_is_stored() -> None:
    layers = [
        SimpleNamespace(tensors=[stored("a", (2,)).tensor]),
        SimpleNamespace(tensors=[stored("b", (2,)).tensor]),
    ]
    index: Any = SimpleNamespace(layers=layers, aliases={"c": "b"})
    found = stored_tensors(index)
    assert {name: (tensor.layer, tensor.name) for name, tensor in found.items()} == {
        "a": (0, "a"),
        "b": (1, "b"),
        "c": (1, "b"),
    }


def test_placeholders_have_the_right_shapes_and_no_memory() -> None:
    names = {f"w{i}": stored(f"w{i}", (100_000, 100_000)) for i in range(3)}
    names["f"] = stored("f", (4, 5), "F32")
    names["n"] = stored("n", (3,), "I64")
    names["scalar"] = stored("scalar", (), "F16")
    made = placeholders(names)
    assert all(tuple(made[name].shape) == s.tensor.shape for name, s in names.items())
    assert made["f"].dtype == torch.float32
    assert made["n"].dtype == torch.int64
    assert sum(tensor.untyped_storage().nbytes() for tensor in made.values()) < 64


def test_placeholders_differ_in_value_unless_they_are_aliases() -> None:
    # transformers ties what the config says is tied only when the values agree.
    names = {"a": stored("a", (2, 2)), "b": stored("b", (2, 2))}
    names["c"] = names["b"]
    made = placeholders(names)
    assert not torch.equal(made["a"], made["b"])
    assert torch.equal(made["b"], made["c"])
    assert not any(tensor.isnan().any() for tensor in made.values())


def test_a_checkpoint_is_mapped_by_transformers_own_renames() -> None:
    model = skeleton(GPTNeoXConfig(**SIZES))
    found = checkpoint_of(model)
    found["embed_out.weight"] = stored("embed_out.weight", (50, 32))
    del found["lm_head.weight"]
    assert map_checkpoint(model, found)["lm_head.weight"].name == "embed_out.weight"


def test_the_base_models_prefix_is_added_as_transformers_does() -> None:
    model = skeleton(LlamaConfig(**SIZES, tie_word_embeddings=True))
    bare = {
        name.removeprefix("model."): stored(name.removeprefix("model."), tensor.tensor.shape)
        for name, tensor in checkpoint_of(model).items()
    }
    mapping = map_checkpoint(model, bare)
    assert mapping["model.layers.1.mlp.up_proj.weight"].name == "layers.1.mlp.up_proj.weight"
    assert set(mapping) == set(model.state_dict()) - {"lm_head.weight"}


def test_experts_that_would_have_to_be_fused_are_refused_with_the_list() -> None:
    model = skeleton(MixtralConfig(**SIZES, num_local_experts=2, num_key_value_heads=2))
    found = {}
    for layer in range(2):
        for expert in range(2):
            for part in ("w1", "w2", "w3"):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
                found[name] = stored(name, (48, 32))
    with pytest.raises(UnsupportedModel, match=r"12 \(model\.layers\.0\.\S+w1.* and 4 more\)"):
        map_checkpoint(model, found)


def test_a_matrix_in_another_dtype_is_refused_with_both() -> None:
    model = skeleton(LlamaConfig(**SIZES))
    found = checkpoint_of(model)
    found["lm_head.weight"] = stored("lm_head.weight", (50, 32), "F32")
    found["model.norm.weight"] = stored("model.norm.weight", (32,), "F32")  # copied: converted
    with pytest.raises(UnsupportedModel, match=r"1 \(lm_head.weight is F32, the model .*bfloat16"):
        map_checkpoint(model, found)


def test_a_tensor_of_another_shape_is_refused_with_both() -> None:
    model = skeleton(LlamaConfig(**SIZES))
    found = checkpoint_of(model) | {"lm_head.weight": stored("lm_head.weight", (51, 32))}
    with pytest.raises(UnsupportedModel, match=r"lm_head.weight is \[51, 32\].*\[50, 32\]"):
        map_checkpoint(model, found)


def test_a_model_that_loads_as_mapped_passes() -> None:
    model = skeleton(LlamaConfig(**SIZES))
    found = checkpoint_of(model)
    made = placeholders(found)
    loaded, info = load(model, made)
    check_loaded(loaded, info, map_checkpoint(model, found), made)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "misses 1 .model.layers.1.mlp.up_proj.weigh"),
        ({"model.layers.0.extra.weight": (32, 48)}, "no place for 1 .model.layers.0.extra.weight"),
    ],
)
def test_missing_and_unexpected_tensors_are_listed(change: dict[str, Any], text: str) -> None:
    model = skeleton(LlamaConfig(**SIZES))
    found = checkpoint_of(model)
    for name, shape in change.items():
        if shape is None:
            del found[name]
        else:
            found[name] = stored(name, shape)
    made = placeholders(found)
    loaded, info = load(model, made)
    with pytest.raises(UnsupportedModel, match=text):
        check_loaded(loaded, info, map_checkpoint(model, found), made)


def test_a_matrix_that_the_loader_converted_is_noticed() -> None:
    model = skeleton(LlamaConfig(**SIZES))
    found = checkpoint_of(model)
    made = placeholders(found)
    loaded, info = load(model, made)
    loaded.lm_head.weight = torch.nn.Parameter(loaded.lm_head.weight.float())
    with pytest.raises(UnsupportedModel, match=r"converts weights .*lm_head.weight .BF16 stored"):
        check_loaded(loaded, info, map_checkpoint(model, found), made)


def test_unfit_parameters_are_listed_with_numbered_ones_grouped() -> None:
    refuse_unfit("Model", [])
    names = [f"h.{i}.attn.c_attn.weight (Conv1D)" for i in range(12)] + ["wpe (Conv1D)"]
    with pytest.raises(UnsupportedModel) as caught:
        refuse_unfit("Model", names)
    assert "h.*.attn.c_attn.weight (Conv1D) (x12), wpe (Conv1D)" in str(caught.value)
