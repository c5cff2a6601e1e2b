"""What it computes is tested in test_calibrate.py; here, what is loaded and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

from tierd_tools.checkpoint import Checkpoint
from tierd_tools.errors import CalibrationError
from tierd_tools.layered_model import LayeredModel

if TYPE_CHECKING:
    from pathlib import Path

IDS = torch.tensor([[5, 6, 7]])


@pytest.fixture
def checkpoint(tiny_models: Any, tmp_path: Path) -> Checkpoint:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=tiny_models.VOCABULARY,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    tiny_models.write(tmp_path / "model", config)
    return Checkpoint.open(tmp_path / "model")


def devices(model: LayeredModel) -> list[set[str]]:
    """Of each layer's weights."""
    return [
        {getattr(place.module, place.attribute).device.type for place in layer}
        for layer in model.layers
    ]


def test_a_layer_has_weights_only_while_it_is_loaded(checkpoint: Checkpoint) -> None:
    model = LayeredModel(checkpoint)
    assert devices(model) == [{"meta"}, {"meta"}]
    with model.loaded(1) as layer:
        assert devices(model) == [{"meta"}, {"cpu"}]
        for place in layer:
            bits = getattr(place.module, place.attribute).detach().numpy().tobytes()
            assert bits == checkpoint.tensors[place.source.name].read().tobytes()
    assert devices(model) == [{"meta"}, {"meta"}]


def test_the_model_says_its_linears_and_its_longest_window(checkpoint: Checkpoint) -> None:
    model = LayeredModel(checkpoint)
    assert len(model.linears) == 14
    assert "model.layers.1.mlp.down_proj.weight" in model.linears
    assert model.max_tokens == 64
    assert model.kind == "LlamaForCausalLM"


@torch.no_grad()
def test_layers_one_after_the_other_make_what_the_whole_model_makes(
    checkpoint: Checkpoint,
) -> None:
    from transformers import AutoModelForCausalLM

    model = LayeredModel(checkpoint)
    output: Any = None
    for number in range(2):
        with model.loaded(number):
            output = model.output_of(number, IDS, output)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint.path)
    expected = []
    whole.model.layers[1].register_forward_hook(lambda module, args, out: expected.append(out))
    whole(input_ids=IDS)
    assert torch.equal(output, expected[0])


@torch.no_grad()
def test_a_layer_that_is_not_loaded_is_an_error_and_no_garbage(checkpoint: Checkpoint) -> None:
    model = LayeredModel(checkpoint)
    with pytest.raises(CalibrationError, match=r"LlamaForCausalLM cannot be run up to .* layer 0"):
        model.output_of(0, IDS, None)


def replace_forward(monkeypatch: pytest.MonkeyPatch, forward: Any) -> None:
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)


@torch.no_grad()
def test_a_model_that_goes_through_its_layers_backwards_is_refused(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backwards(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        states = self.embed_tokens(input_ids)
        for layer in reversed(self.layers):
            states = layer(states)
        return states

    replace_forward(monkeypatch, backwards)
    model = LayeredModel(checkpoint)
    with model.loaded(0), pytest.raises(CalibrationError, match="layers in their order"):
        model.output_of(0, IDS, None)


@torch.no_grad()
def test_a_model_that_leaves_a_layer_out_is_refused(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    def first_only(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        states = self.layers[0](self.embed_tokens(input_ids))
        return BaseModelOutputWithPast(last_hidden_state=states)

    replace_forward(monkeypatch, first_only)
    model = LayeredModel(checkpoint)
    known = torch.zeros(1, 3, 16)
    with (
        model.loaded(1),
        pytest.raises(CalibrationError, match="does not call its decoder layer 1"),
    ):
        model.output_of(1, IDS, known)


@torch.no_grad()
def test_weights_that_are_used_without_their_module_are_refused(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def around(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.layers[0](torch.zeros(1, 3, 16) + self.embed_tokens.weight[0])

    replace_forward(monkeypatch, around)
    model = LayeredModel(checkpoint)
    with model.loaded(0), pytest.raises(CalibrationError, match="cannot be run up to"):
        model.output_of(0, IDS, None)
