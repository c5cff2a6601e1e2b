from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig

from tierd_tools import evidence
from tierd_tools.errors import CheckpointMissing, EvaluationError
from tierd_tools.evaluate import EvalReport
from tierd_tools.evidence import Finding, Pruning, collect, halves, models_in, tables

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REPORT = EvalReport(
    pack_dir="/packs/a",
    text="dev.txt",
    windows=1,
    window_tokens=256,
    compute="fused",
    dtype="bfloat16",
    threads=1,
    perplexity=12.345,
    scored_tokens=255,
    scored_tokens_per_s=1.0,
    decoded_tokens=2,
    decoded_tokens_per_s=1.0,
    ssd_read_bytes=1,
    pack_bytes=1,
    dense_bytes=1,
    linear_bytes=1 << 20,
    linear_dense_bytes=5 << 19,
    codecs={"raw": 1},
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `../shared/models` is: one random model and a text."""
    folder: Path = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=tiny_models.VOCABULARY,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )
    tiny_models.write(folder / "tiny", config, torch.bfloat16)
    (folder / "dev.txt").write_text("".join(f"{n}: the fox, the dog and {n}\n" for n in range(800)))
    return folder


def test_the_halves_of_a_text_share_no_line_and_miss_none(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("".join(f"line {n}, ä\n" for n in range(9)))
    first, second = (part.read_text() for part in halves(text, tmp_path))
    assert first + second == text.read_text()
    assert first.count("\n") == 4
    assert not set(first.splitlines()) & set(second.splitlines())


def test_a_table_has_a_row_a_pruning_and_three_columns_a_codec() -> None:
    worse = replace(REPORT, perplexity=99.0, linear_bytes=5 << 17)
    text = tables(
        [
            Finding("a", Pruning(), "raw", REPORT),
            Finding("a", Pruning(), "int8", worse),
            Finding("a", Pruning("wanda", 0.5), "raw", worse),
            Finding("a", Pruning("wanda", 0.5), "int8", REPORT),
            Finding("b", Pruning(), "raw", REPORT),
        ]
    )
    assert text.splitlines() == [
        "## a",
        "",
        "Linear layers: 2.5 MiB in bf16.",
        "",
        "| pruning | raw | ratio | perplexity | int8 | ratio | perplexity |",
        "|---|---:|---:|---:|---:|---:|---:|",
        "| unpruned | 1.0 MiB | 2.50x | 12.35 | 640.0 KiB | 4.00x | 99.00 |",
        "| wanda 50% | 640.0 KiB | 4.00x | 99.00 | 1.0 MiB | 2.50x | 12.35 |",
        "",
        "## b",
        "",
        "Linear layers: 2.5 MiB in bf16.",
        "",
        "| pruning | raw | ratio | perplexity |",
        "|---|---:|---:|---:|",
        "| unpruned | 1.0 MiB | 2.50x | 12.35 |",
    ]


def test_every_combination_is_packed_and_evaluated(models: Path) -> None:
    prunings = (Pruning("magnitude", 0.5), Pruning("wanda", 0.5))
    codecs = ("lossless", "raw", "int4")
    found = list(
        collect([models / "tiny"], models / "dev.txt", windows=2, prunings=prunings, codecs=codecs)
    )
    assert [(f.pruning, f.codec) for f in found] == [(p, c) for p in prunings for c in codecs]
    assert {f.model for f in found} == {"tiny"}
    perplexity = {(f.pruning.method, f.codec): f.report.perplexity for f in found}
    assert perplexity["wanda", "lossless"] == perplexity["wanda", "raw"]
    assert perplexity["wanda", "raw"] != perplexity["magnitude", "raw"]
    assert perplexity["wanda", "int4"] != perplexity["wanda", "raw"]


def test_two_lossless_codecs_that_differ_are_an_error(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([REPORT, replace(REPORT, perplexity=12.346)])
    monkeypatch.setattr(evidence, "evaluate", lambda *args, **kwargs: next(figures))
    with pytest.raises(EvaluationError, match=r"tiny, unpruned: not the same .*12\.346"):
        list(collect([models / "tiny"], models / "dev.txt", prunings=(Pruning(),)))


def test_a_folder_without_models_or_text_is_refused(models: Path, tmp_path: Path) -> None:
    assert models_in(models) == [models / "tiny"]
    with pytest.raises(CheckpointMissing, match="no model folders"):
        models_in(tmp_path)
    assert evidence.main([str(tmp_path)]) == 1


def test_the_page_says_how_it_was_made(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evidence, "evaluate", lambda *args, **kwargs: REPORT)
    monkeypatch.setattr(evidence, "pack", lambda *args, **kwargs: None)
    assert evidence.main([str(models), "--windows", "7", "--threads", "1"]) == 0
    output = capsys.readouterr()
    assert f"`python -m tierd_tools.evidence {models} --windows 7 --threads 1`" in output.out
    assert "over 7 consecutive windows of 256 tokens" in output.out
    assert output.out.count("| 12.35 |") == 9 * 4
    assert len(output.err.splitlines()) == 9 * 4
