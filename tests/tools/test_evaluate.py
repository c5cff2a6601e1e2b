from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tierd_layouts.container import open_pack
from tierd_layouts.errors import FormatError
from tierd_tools.errors import BadSetting, EvaluationError, TextRefused
from tierd_tools.evaluate import evaluate
from tierd_tools.pack import pack
from tierd_tools.token_windows import consecutive, read_tokens
from tierd_tools.unpack import unpack

TRAINED = Path(__file__).resolve().parents[3] / "shared" / "models"
DRAM = "64MiB"


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("The quick brown fox jumps over the lazy dog; 0123456789. " * 20)
    return path


def config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=260,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=128,
        **more,
    )


@pytest.fixture(scope="module")
def packed(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned pack of a random bf16 model; its unpacked checkpoint lies beside it."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_models.write(folder / "source", config(), torch.bfloat16)
    pack(folder / "source", folder / "packed", prune="magnitude", sparsity=0.5, codec="raw")
    unpack(folder / "packed", folder / "reference")
    return folder / "packed"


def perplexity_in_memory(folder: Path, text: Path, windows: int, window_tokens: int) -> float:
    """One window at a time, by the definition."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = consecutive(read_tokens(folder, text), windows, window_tokens, where="the text")
    losses = []
    with torch.no_grad():
        for row in ids:
            scores = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
            losses += [-float(scores[i - 1, row[i]]) for i in range(1, window_tokens)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("compute", ["dense", "fused"])
def test_perplexity_is_that_of_the_unpacked_model_in_memory(
    packed: Path, text: Path, compute: str
) -> None:
    report = evaluate(packed, text, windows=9, window_tokens=100, compute=compute, dram=DRAM)
    expected = perplexity_in_memory(packed.parent / "reference", text, 9, 100)
    assert report.perplexity == pytest.approx(expected, rel=2e-3)
    assert report.scored_tokens == 9 * 99
    assert report.dtype == "bfloat16"
    assert report.compute == compute
    assert report.decoded_tokens == 32
    assert report.decoded_tokens_per_s > 0
    assert report.scored_tokens_per_s > 0


def test_the_report_has_the_sizes_of_the_pack_and_what_was_read(packed: Path, text: Path) -> None:
    report = evaluate(packed, text, windows=1, window_tokens=8, dram=DRAM)
    index = open_pack(packed)
    assert report.pack_bytes == index.pack_bytes
    assert report.ssd_read_bytes == index.pack_bytes, "it fits the budget: read once"
    linear = 2 * (4 * 128 * 128 + 3 * 128 * 200)
    assert report.linear_dense_bytes == 2 * linear
    assert report.linear_bytes > linear, "half of the values are there"
    assert report.codecs == {"raw": 14}
    assert 1.5 < report.linear_ratio < 1.78
    plain = json.loads(json.dumps(asdict(report)))
    assert plain["perplexity"] == report.perplexity


def test_the_summary_says_what_the_figures_were_computed_in(packed: Path, text: Path) -> None:
    lines = evaluate(packed, text, windows=1, window_tokens=8, dram=DRAM).summary().splitlines()
    assert lines[0].endswith("over 1 windows of 8 tokens (bfloat16, fused)")
    assert "(1 threads)" in lines[1]
    assert "14 raw" in lines[2]


def test_progress_ends_at_the_whole_text(packed: Path, text: Path) -> None:
    class Recorded:
        total = done = 0

        def stage(self, title: str, total_bytes: int) -> Any:
            self.total = total_bytes
            return self

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exception: object) -> None:
            pass

        def advance(self, nbytes: int) -> None:
            self.done += nbytes

        def note(self, text: str) -> None:
            pass

    progress = Recorded()
    evaluate(packed, text, windows=3, window_tokens=100, dram=DRAM, progress=progress)
    assert progress.done == progress.total > 0


# ---------------------------------------------------------------------------------------- refused


def test_settings_outside_their_range_are_refused(packed: Path, text: Path) -> None:
    with pytest.raises(BadSetting, match="compute 'sparse' is unknown"):
        evaluate(packed, text, compute="sparse")
    with pytest.raises(BadSetting, match="1 windows of 1 tokens"):
        evaluate(packed, text, windows=1, window_tokens=1)
    with pytest.raises(BadSetting, match="256 tokens: the model takes at most 128"):
        evaluate(packed, text, windows=1, dram=DRAM)


def test_a_text_that_is_too_short_is_refused_before_anything_is_served(
    packed: Path, text: Path
) -> None:
    with pytest.raises(TextRefused, match="1,140 tokens, 60 windows of 256"):
        evaluate(packed, text)


def test_what_is_no_pack_is_refused(tmp_path: Path, text: Path) -> None:
    with pytest.raises(FormatError):
        evaluate(tmp_path, text)


def test_a_model_that_the_client_refuses_is_named(
    tiny_models: Any, checkpoints: Any, tmp_path: Path, text: Path
) -> None:
    checkpoints.write(tmp_path / "model", checkpoints.llama(layers=1))
    tiny_models.write_tokenizer(tmp_path / "model")
    pack(tmp_path / "model", tmp_path / "packed", codec="raw")
    with pytest.raises(EvaluationError, match="no causal LM"):
        evaluate(tmp_path / "packed", text, windows=1, window_tokens=8, dram=DRAM)


# ---------------------------------------------------------------------------------- trained models


@pytest.mark.parametrize("name", ["stdlib-opt-12m", "stdlib-llama-12m"])
def test_a_trained_model_scores_as_in_memory(name: str, tmp_path: Path) -> None:
    if not (TRAINED / name / "config.json").is_file():
        pytest.skip(f"trained model {name} is not in ../shared/models")
    pack(TRAINED / name, tmp_path / name, codec="raw")
    text = TRAINED / "dev.txt"
    report = evaluate(tmp_path / name, text, windows=3, dram=DRAM)
    expected = perplexity_in_memory(TRAINED / name, text, 3, 256)
    assert 5 < expected < 50, "this is no trained model"
    assert report.perplexity == pytest.approx(expected, rel=2e-3)


def test_a_folder_of_the_same_name_where_the_command_runs_is_not_scored(
    packed: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / packed.name).mkdir()
    monkeypatch.chdir(tmp_path)
    report = evaluate(packed, text, windows=1, window_tokens=8, dram=DRAM)
    assert report.pack_dir == str(packed.resolve())


def test_a_model_whose_loss_is_no_number_has_no_perplexity(
    tiny_models: Any, text: Path, tmp_path: Path
) -> None:
    tiny_models.write(tmp_path / "source", config(), torch.bfloat16)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["model.norm.weight"][:] = torch.nan
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    pack(tmp_path / "source", tmp_path / "packed")
    with pytest.raises(EvaluationError, match="the loss is nan nats a token"):
        evaluate(tmp_path / "packed", text, windows=1, window_tokens=8, dram=DRAM)
