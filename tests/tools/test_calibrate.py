"""Norms collected layer by layer against hooks on the whole model in memory."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
)

from tierd_tools.calibrate import input_norms
from tierd_tools.checkpoint import Checkpoint
from tierd_tools.errors import BadSetting, CalibrationError, CheckpointError, TextRefused
from tierd_tools.sparsity import Sparsities
from tierd_tools.token_windows import read_tokens, spread
from tierd_tools.wanda import wanda

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tierd_tools.checkpoint import SourceTensor

SIZES: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 260,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EMBEDDING = (260, 40)  # vocabulary, hidden size
LAYER_MATRICES = 7  # of a Llama


def opt(**more: Any) -> OPTConfig:
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    return OPTConfig(**sizes, ffn_dim=72, max_position_embeddings=96, **more)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True),
    "llama-bias": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "opt": opt,
    "opt-projected": lambda: opt(word_embed_proj_dim=24, do_layer_norm_before=False),
    "qwen3": lambda: Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=12),
    "gpt-neox": lambda: GPTNeoXConfig(**SIZES),
    "gpt-neox-serial": lambda: GPTNeoXConfig(**SIZES, use_parallel_residual=False),
    # every other layer has another mask: what the model does between its layers counts
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=20, num_key_value_heads=1, sliding_window=6),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("The quick brown fox jumps over the lazy dog; 0123456789. " * 20)
    return path


def linears_of(model: Any, checkpoint: Checkpoint) -> dict[str, nn.Linear]:
    """The linear layers in numbered layers; these models' names are the checkpoint's."""
    found = {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in path.split("."))
    }
    assert set(found) <= set(checkpoint.tensors)
    return found


def hooked_norms(
    model: Any, linears: dict[str, nn.Linear], batch: torch.Tensor
) -> dict[str, np.ndarray[Any, Any]]:
    """The norms of the whole model in memory, all windows in one batch."""
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: Any) -> None:
            sums[name] = args[0].double().square().flatten(0, -2).sum(0)

        return add

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    with torch.no_grad():
        model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {name: total.sqrt().numpy() for name, total in sums.items()}


def relative_error(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.max(np.abs(got - expected) / np.max(np.abs(expected))))


@pytest.mark.parametrize("kind", CONFIGS)
def test_norms_are_those_of_hooks_on_the_whole_model(
    kind: str, tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    model = tiny_models.write(tmp_path / "model", CONFIGS[kind]())
    checkpoint = Checkpoint.open(tmp_path / "model")
    norms = input_norms(checkpoint, text, Sparsities(), windows=5, window_tokens=24)
    linears = linears_of(model, checkpoint)
    batch = spread(read_tokens(tmp_path / "model", text), 5, 24, where="the text")
    expected = hooked_norms(model, linears, batch)
    assert norms.keys() == expected.keys()
    for name, norm in norms.items():
        assert norm.dtype == np.float32
        assert np.ptp(norm) > 0
        np.testing.assert_allclose(norm, expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_bf16_model_is_calibrated_in_bf16(tiny_models: Any, tmp_path: Path, text: Path) -> None:
    model = tiny_models.write(tmp_path / "model", CONFIGS["llama"](), torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path / "model")
    norms = input_norms(checkpoint, text, Sparsities(), windows=1, window_tokens=24)
    batch = spread(read_tokens(tmp_path / "model", text), 1, 24, where="the text")
    expected = hooked_norms(model, linears_of(model, checkpoint), batch)
    for name, norm in norms.items():
        assert relative_error(norm, expected[name]) < 1e-4, name


@pytest.mark.parametrize("kind", ["llama", "opt", "qwen3", "gpt-neox"])
def test_each_layer_sees_what_the_pruned_layers_before_it_make(
    kind: str, tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    model = tiny_models.write(tmp_path / "model", CONFIGS[kind]())
    checkpoint = Checkpoint.open(tmp_path / "model")
    sparsities = Sparsities(0.5, exceptions=(("*.1", 0.25),))
    norms = input_norms(checkpoint, text, sparsities, windows=4, window_tokens=24)
    linears = linears_of(model, checkpoint)
    batch = spread(read_tokens(tmp_path / "model", text), 4, 24, where="the text")
    # The whole model in memory, pruned up to the layer before: one layer further each time.
    layers = sorted({next(p for p in name.split(".") if p.isdigit()) for name in linears})
    unpruned = hooked_norms(model, linears, batch)
    for number in layers:
        expected = hooked_norms(model, linears, batch)
        for name in [name for name in linears if f".{number}." in name]:
            np.testing.assert_allclose(norms[name], expected[name], rtol=1e-4, err_msg=name)
            weight = linears[name].weight
            bits = weight.detach().numpy().view(np.uint32)
            pruned = wanda(bits, "F32", norms[name], sparsities.of(name))
            weight.data = torch.from_numpy(pruned.view(np.float32).copy())
    last = next(name for name in linears if f".{layers[-1]}." in name)
    assert relative_error(norms[last], unpruned[last]) > 1e-3, "pruning changed nothing"


class Watched:
    """A tensor that looks, whenever it is read, at the matrices that torch holds by then."""

    held: ClassVar[list[tuple[str, list[tuple[int, ...]]]]] = []

    def __init__(self, tensor: SourceTensor) -> None:
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tensor, name)

    def read(self) -> Any:
        matrices = [
            tuple(item.shape)
            for item in gc.get_objects()
            if type(item) is nn.Parameter and item.device.type == "cpu" and item.ndim == 2
        ]
        self.held.append((self._tensor.name, matrices))
        return self._tensor.read()


def untied_llama(layers: int) -> Any:
    return LlamaConfig(**SIZES | {"num_hidden_layers": layers}, tie_word_embeddings=False)


def test_never_more_than_one_decoder_layer_is_in_memory(
    tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    tiny_models.write(tmp_path / "model", untied_llama(6))
    checkpoint = Checkpoint.open(tmp_path / "model")
    watched: Any = {name: Watched(tensor) for name, tensor in checkpoint.tensors.items()}
    Watched.held.clear()
    checkpoint = replace(checkpoint, tensors=watched)
    gc.collect()
    gc.freeze()  # what was there before is not shown, so that looking is quick
    try:
        input_norms(checkpoint, text, Sparsities(0.5), windows=2, window_tokens=16)
    finally:
        gc.unfreeze()
    in_layers = [(name, shapes) for name, shapes in Watched.held if ".layers." in name]
    assert len(in_layers) == 6 * 9, "every tensor of a layer is read once"
    most = max(sum(shape != EMBEDDING for shape in shapes) for _, shapes in in_layers)
    assert most == LAYER_MATRICES, "the last tensor of a layer is read beside its matrices"
    outside = [name for name, _ in Watched.held if ".layers." not in name]
    assert outside == ["model.embed_tokens.weight"], "the final norm and the head are never used"


def test_the_same_text_gives_the_same_norms_to_the_bit(
    tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    tiny_models.write(tmp_path / "model", CONFIGS["qwen3"](), torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path / "model")
    first, second = (
        input_norms(checkpoint, text, Sparsities(0.5), windows=3, window_tokens=16)
        for _ in range(2)
    )
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_windows_are_no_longer_than_the_model_takes(
    tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    tiny_models.write(tmp_path / "model", opt())
    checkpoint = Checkpoint.open(tmp_path / "model")
    long, longest = (
        input_norms(checkpoint, text, Sparsities(), windows=2, window_tokens=tokens)
        for tokens in (256, 96)
    )
    assert all(np.array_equal(long[name], longest[name]) for name in long)


def test_progress_is_told_of_every_layer(tiny_models: Any, tmp_path: Path, text: Path) -> None:
    from tierd_tools.progress import LineProgress

    class Lines:
        def __init__(self) -> None:
            self.text = ""

        def write(self, text: str) -> int:
            self.text += text
            return len(text)

        def flush(self) -> None:
            pass

    tiny_models.write(tmp_path / "model", CONFIGS["llama"]())
    lines: Any = Lines()
    checkpoint = Checkpoint.open(tmp_path / "model")
    progress = LineProgress(lines)
    input_norms(checkpoint, text, Sparsities(), windows=1, window_tokens=8, progress=progress)
    assert lines.text.startswith("calibrating: ")
    assert "(100 %)" in lines.text


# ------------------------------------------------------------------------------------------ refused


def test_a_model_without_a_tokenizer_is_refused(
    tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    tiny_models.write(tmp_path / "model", CONFIGS["llama"]())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    with pytest.raises(TextRefused, match="has no tokenizer"):
        input_norms(Checkpoint.open(tmp_path / "model"), text, Sparsities(0.5))


def test_a_tokenizer_that_does_not_load_is_refused(
    tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    tiny_models.write(tmp_path / "model", CONFIGS["llama"]())
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    with pytest.raises(TextRefused, match="tokenizer cannot be loaded"):
        input_norms(Checkpoint.open(tmp_path / "model"), text, Sparsities(0.5))


def test_a_text_that_is_too_short_or_unreadable_is_refused(
    tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    tiny_models.write(tmp_path / "model", CONFIGS["llama"]())
    checkpoint = Checkpoint.open(tmp_path / "model")
    with pytest.raises(TextRefused, match=r"1,140 tokens, 32 windows of 256 take 8,192"):
        input_norms(checkpoint, text, Sparsities(0.5))
    with pytest.raises(TextRefused, match="No such file"):
        input_norms(checkpoint, tmp_path / "nothing", Sparsities(0.5))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextRefused, match="not UTF-8"):
        input_norms(checkpoint, tmp_path / "binary", Sparsities(0.5))
    with pytest.raises(BadSetting, match="0 windows"):
        input_norms(checkpoint, text, Sparsities(0.5), windows=0)


def test_a_layer_that_is_no_linear_is_named_when_it_is_to_be_pruned(
    tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    config = GPT2Config(n_embd=40, n_layer=2, n_head=2, vocab_size=260)
    tiny_models.write(tmp_path / "model", config)
    with pytest.raises(CalibrationError, match="GPT2LMHeadModel has its linear layers in no"):
        input_norms(Checkpoint.open(tmp_path / "model"), text, Sparsities(0.5))


def test_a_tensor_outside_the_decoder_is_named_when_it_is_to_be_pruned(
    tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    @dataclass(frozen=True)
    class HeadToo:
        def of(self, tensor_name: str) -> float:
            return 0.5

    tiny_models.write(tmp_path / "model", untied_llama(2))
    with pytest.raises(CalibrationError, match=r"2 of 16 .* lm_head.weight, model.embed_tokens"):
        input_norms(Checkpoint.open(tmp_path / "model"), text, HeadToo())


def test_a_folder_whose_config_names_no_model_is_refused(
    tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    tiny_models.write(tmp_path / "model", CONFIGS["llama"]())
    (tmp_path / "model" / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(CalibrationError, match="no-such-model"):
        input_norms(Checkpoint.open(tmp_path / "model"), text, Sparsities(0.5))


def test_a_tensor_that_the_model_does_not_know_is_named(
    tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tiny_models.write(tmp_path / "model", CONFIGS["llama"]())
    shard = tmp_path / "model" / "model.safetensors"
    tensors = load_file(shard) | {"model.layers.7.extra.weight": torch.ones(3, 3)}
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CalibrationError, match=r"model\.layers\.7\.extra\.weight"):
        input_norms(Checkpoint.open(tmp_path / "model"), text, Sparsities(0.5))


def test_activations_that_are_no_numbers_are_refused(
    tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    model = tiny_models.write(tmp_path / "model", CONFIGS["llama"]())
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(float("inf"))
    model.save_pretrained(tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    with pytest.raises(CalibrationError, match=r"layers\.1\.self_attn\.\S* overflow"):
        input_norms(checkpoint, text, Sparsities(0.5), windows=1, window_tokens=8)


def test_a_shard_that_was_cut_short_is_a_checkpoint_error(
    tiny_models: Any, tmp_path: Path, text: Path
) -> None:
    tiny_models.write(tmp_path / "model", CONFIGS["llama"]())
    checkpoint = Checkpoint.open(tmp_path / "model")
    shard = tmp_path / "model" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-20000])
    with pytest.raises(CheckpointError, match="ends at byte"):
        input_norms(checkpoint, text, Sparsities(0.5), windows=1, window_tokens=8)
