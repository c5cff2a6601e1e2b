"""tierctl predict: what a machine would do that is not there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tierd.sim.steady import Node
from tierd_layouts.container import open_pack
from tierd_tools import predict, random_model, tierctl
from tierd_tools.errors import BadSetting, NotServable

if TYPE_CHECKING:
    from pathlib import Path

GB = 10**9
MIB = 1 << 20
EQUAL = predict.of_layers(24, 32 * MIB)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "tiny"
    random_model.write_pack(folder, random_model.TINY)
    return folder


def test_a_pass_over_a_pack_is_its_layers_and_a_tied_embedding_once_more(pack: Path) -> None:
    index = open_pack(pack)
    model = predict.of_pack(pack)
    names = [index.layers[number].name for number in model.order]
    assert names == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.embed_tokens"]
    assert model.weights[0] == 0  # a lookup
    assert model.weights[-1] == index.layers[0].nbytes
    assert model.nbytes == index.pack_bytes


def test_the_figures_agree_with_arithmetic() -> None:
    found = predict.predict(EQUAL, Node(EQUAL.nbytes // 2, GB), compute_seconds=0.05)
    assert found.binds == "ssd"
    assert found.seconds_per_token == pytest.approx(found.ssd_bytes / GB, rel=0.05)
    assert found.stall_seconds == pytest.approx(found.seconds_per_token - 0.05, rel=0.01)
    assert EQUAL.nbytes // 2 <= found.ssd_bytes <= EQUAL.nbytes // 2 + 3 * 32 * MIB
    assert found.memory_bytes == EQUAL.nbytes
    assert found.copy_bytes is None
    slow = predict.predict(EQUAL, Node(EQUAL.nbytes // 2, GB), compute_seconds=5)
    assert slow.binds == "compute"
    assert slow.seconds_per_token == pytest.approx(5, rel=0.01)


def test_the_compute_follows_from_the_memory_bandwidth() -> None:
    found = predict.predict(EQUAL, Node(2 * EQUAL.nbytes, GB), memory_bandwidth=10 * GB)
    assert found.compute_seconds == pytest.approx(EQUAL.nbytes / 10 / GB, rel=0.001)
    assert found.seconds_per_token == found.compute_seconds


def test_tokens_of_a_pass_share_its_bytes() -> None:
    node = Node(EQUAL.nbytes // 2, GB)
    one = predict.predict(EQUAL, node, compute_seconds=0)
    four = predict.predict(EQUAL, node, compute_seconds=0, tokens_per_pass=4)
    assert four.ssd_bytes == pytest.approx(one.ssd_bytes / 4, rel=0.05)
    assert four.tokens_per_second == pytest.approx(4 * one.tokens_per_second, rel=0.05)


def test_without_a_compute_time_the_report_says_so() -> None:
    found = predict.predict(EQUAL, Node(EQUAL.nbytes // 2, GB))
    assert any("no compute time" in note for note in found.notes)
    assert "no compute time" in found.summary()


def test_two_ways_to_say_the_compute_time_are_one_too_many() -> None:
    with pytest.raises(BadSetting, match="not both"):
        predict.predict(EQUAL, Node(GB, GB), compute_seconds=1, memory_bandwidth=GB)


def test_a_machine_that_cannot_serve_the_model_is_refused_with_the_numbers() -> None:
    with pytest.raises(NotServable, match=r"3 clients on 64\.0 MiB:"):
        predict.predict(EQUAL, Node(2 * 32 * MIB, GB), clients=3)
    with pytest.raises(NotServable, match=r"1 client on .* and 1\.0 MiB of GPU:"):
        predict.predict(EQUAL, Node(GB, GB, gpu_bytes=MIB, copy_bytes_per_s=GB))


def test_less_memory_than_a_page_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["predict", "--layers", "2", "--layer-bytes", "1MB", "--ssd", "1GB/s", "--dram", "1MiB"]
    assert tierctl.main(argv) == 2
    assert "dram 1.0 MiB is less than a page of 2.0 MiB" in capsys.readouterr().err


def test_a_pack_whose_configuration_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_model.write_pack(tmp_path / "tiny", random_model.TINY)
    (tmp_path / "tiny" / "config.json").write_text("{")
    argv = ["predict", "--model", str(tmp_path / "tiny"), "--dram", "1GiB", "--ssd", "1GB/s"]
    assert tierctl.main(argv) == 1
    assert f"{tmp_path}/tiny/config.json is not JSON: " in capsys.readouterr().err


ARGV = ["predict", "--dram", "300MB", "--ssd", "1GB/s"]
LAYERS = ["--layers", "24", "--layer-bytes", "32MiB"]


def test_the_command_prints_what_binds(capsys: pytest.CaptureFixture[str]) -> None:
    assert tierctl.main([*ARGV, *LAYERS, "--compute", "0.1"]) == 0
    assert "ssd binds" in capsys.readouterr().out
    assert tierctl.main([*ARGV, *LAYERS, "--gpu", "200MB", "--copy", "0.1GB/s"]) == 0
    assert "copy binds" in capsys.readouterr().out
    slow_link = [*ARGV, *LAYERS, "--gpu", "200MB", "--copy", "0.1GB/s"]
    assert tierctl.main([*slow_link, "--direct"]) == 0
    assert "ssd binds" in capsys.readouterr().out, "nothing is copied"


def test_the_command_reads_a_pack_and_prints_json(
    pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["predict", "--model", str(pack), "--dram", "64MiB", "--ssd", "1GB", "--compute", "0.01"]
    assert tierctl.main([*argv, "--clients", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["binds"] == "compute"
    assert found["seconds_per_token"] == pytest.approx(0.01, rel=0.01)
    assert found["tokens_per_second"] == pytest.approx(200, rel=0.01)


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([], "--model PACK"),
        (["--layers", "3"], "--model PACK"),
        ([*LAYERS, "--model", "x"], "--model PACK"),
        ([*LAYERS, "--copy", "1GB"], "--gpu"),
        ([*LAYERS, "--direct"], "--direct is how a GPU reads: give --gpu"),
        ([*LAYERS, "--clients", "100000"], "100000 clients with 24 layers each are too much"),
        (["--layers", "100000000", "--layer-bytes", "1MB"], "at most 100000 layers in all"),
        ([*LAYERS, "--compute", "-1"], "--compute -1"),
        ([*LAYERS, "--compute", "nan"], "--compute nan"),
    ],
)
def test_what_does_not_go_together_is_usage(
    argv: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tierctl.main([*ARGV, *argv]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--layers", "0"], ["--clients", "x"], ["--layer-bytes", "2XB"]])
def test_a_number_that_is_none_is_usage(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        tierctl.main([*ARGV, *LAYERS, *argv])
    assert end.value.code == 2
