"""The command line: exit codes, JSON, and that every command is documented."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tierd_tools import daemon_commands, pack_commands, random_model, tierctl
from tierd_tools.serving import serve

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMANDS = (
    *("pack", "verify", "unpack", "eval", "status", "models", "layers", "clients", "config"),
    *("reload", "pin", "unpin", "evict", "budget", "why", "trace", "replay", "predict", "doctor"),
)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    random_model.write_pack(folder / "tiny", random_model.TINY)
    return folder


@pytest.fixture(scope="module")
def socket(packs: Path) -> Iterator[str]:
    with serve(["--models", str(packs), "--dram", "64MiB"], packs / "log") as daemon:
        yield daemon.socket


def test_every_command_has_help_and_stands_in_the_readme(
    capsys: pytest.CaptureFixture[str],
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    with pytest.raises(SystemExit):
        tierctl.main(["--help"])
    listed = re.findall("^    ([a-z]+) ", capsys.readouterr().out, re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    for command in COMMANDS:
        with pytest.raises(SystemExit) as end:
            tierctl.main([command, "--help"])
        assert end.value.code == 0
        assert "--json" in capsys.readouterr().out
        assert f"tierctl {command}" in readme


def test_wrong_usage_exits_with_2() -> None:
    for argv in ([], ["no-such-command"], ["pack"], ["layers"], ["status", "--no-such-flag"]):
        with pytest.raises(SystemExit) as end:
            tierctl.main(argv)
        assert end.value.code == 2


@pytest.mark.parametrize("sparsity", ["1.0", "-0.1", "nan"])
def test_a_sparsity_outside_its_range_is_usage(
    sparsity: str, packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["pack", str(packs), str(tmp_path / "p"), "--prune", "magnitude"]
    assert tierctl.main([*argv, "--sparsity", sparsity]) == 2
    assert sparsity.rstrip("0").rstrip(".") in capsys.readouterr().err


def test_every_setting_of_pack_reaches_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tierd_tools import pack

    def called(*arguments: object, progress: object, **settings: object) -> dict[str, object]:
        return {"arguments": [str(argument) for argument in arguments], **settings}

    monkeypatch.setattr(pack, "pack", called)
    argv = ["pack", "m", "p", "--json", "--codec", "int4", "--group", "64", "--prune", "wanda"]
    argv += ["--sparsity", "0.5", "--sparsity-of", "a=0.1", "--sparsity-of", "b=0.2"]
    argv += ["--keep", "c", "--keep", "d", "--calibration", "t", "--calibration-windows", "3"]
    assert tierctl.main(argv) == 0
    assert json.loads(capsys.readouterr().out) == {
        "arguments": ["m", "p"],
        "codec": "int4",
        "group": 64,
        "prune": "wanda",
        "sparsity": 0.5,
        "sparsity_of": ["a=0.1", "b=0.2"],
        "keep": ["c", "d"],
        "calibration": "t",
        "calibration_windows": 3,
    }
    assert tierctl.main(["pack", "m", "p", "--json"]) == 0
    defaults = json.loads(capsys.readouterr().out)
    assert (defaults["codec"], defaults["prune"], defaults["group"]) == ("lossless", "none", None)


def test_the_settings_of_eval_and_unpack_reach_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tierd_tools import evaluate, unpack

    def called(*arguments: object, progress: object, **settings: object) -> dict[str, object]:
        return {"arguments": [str(argument) for argument in arguments], **settings}

    monkeypatch.setattr(evaluate, "evaluate", called)
    monkeypatch.setattr(unpack, "unpack", called)
    for argv, expected in (
        (["eval", "p", "--text", "t"], {"arguments": ["p", "t"]}),
        (
            ["eval", "p", "--text", "t", "--windows", "2", "--window-tokens", "9"],
            {"arguments": ["p", "t"], "windows": 2, "window_tokens": 9},
        ),
        (["unpack", "p", "o"], {"arguments": ["p", "o"], "format": "checkpoint"}),
        (
            ["unpack", "p", "o", "--format", "sparse-bitmask"],
            {"arguments": ["p", "o"], "format": "sparse-bitmask"},
        ),
    ):
        assert tierctl.main([*argv, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == expected


def test_a_setting_that_is_refused_names_the_value_and_what_is_allowed(
    packs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        tierctl.main(["pack", str(packs), str(tmp_path / "p"), "--codec", "int3"])
    assert end.value.code == 2
    assert "'int3' (choose from " in capsys.readouterr().err
    for argv, text in (
        (["--codec", "int8", "--group", "100"], "group 100 is not a positive multiple of 64"),
        (["--prune", "magnitude", "--sparsity-of", "x"], "'x' is not PATTERN=S"),
    ):
        assert tierctl.main(["pack", str(packs), str(tmp_path / "p"), *argv]) == 2
        assert text in capsys.readouterr().err


@pytest.mark.parametrize("path", ["", "/tmp/" + "s" * 103])
def test_a_socket_that_cannot_be_a_path_is_usage_as_it_is_for_the_daemon(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tierctl.main(["status", "--socket", path]) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert repr(path) in text


@pytest.mark.parametrize("argv", [["layers", "../x"], ["why", "../x", "0"], ["pin", "a b"]])
def test_a_name_that_no_model_can_have_is_usage(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tierctl.main(argv) == 2
    assert f"model name {argv[1]!r} is refused: allowed are " in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named(
    socket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "absent" / "day.json"
    assert tierctl.main(["trace", "--socket", socket, "-o", str(path)]) == 1
    assert capsys.readouterr().err == f"tierctl: {path}: No such file or directory\n"


@pytest.mark.parametrize("command", ["status", "pack"])
def test_an_interrupt_promises_to_resume_only_where_that_is_so(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(daemon_commands, "_ask", interrupted)
    monkeypatch.setattr(pack_commands, "_pack", interrupted)
    assert tierctl.main(["pack", "m", "p"] if command == "pack" else [command]) == 1
    assert ("resumes" in capsys.readouterr().err) == (command == "pack")


def test_a_failure_exits_with_1_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tierctl.main(["pack", str(tmp_path / "missing"), str(tmp_path / "p")]) == 1
    assert tierctl.main(["verify", str(tmp_path / "missing")]) == 1
    assert tierctl.main(["status", "--socket", str(tmp_path / "nobody.sock")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "nobody.sock" in lines[2]


@pytest.mark.parametrize("command", ["status", "models", "clients", "config", "reload"])
def test_a_daemon_answers_as_a_table_and_as_json(
    command: str, socket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tierctl.main([command, "--socket", socket]) == 0
    assert capsys.readouterr().out.strip()
    assert tierctl.main([command, "--socket", socket, "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def test_a_reload_that_meets_a_broken_pack_fails_and_says_which(
    packs: Path, socket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = packs / "broken"
    broken.mkdir()
    (broken / "tierd.json").write_text("{")
    try:
        assert tierctl.main(["reload", "--socket", socket]) == 1
        assert "failed broken" in capsys.readouterr().out
    finally:
        (broken / "tierd.json").unlink()
        broken.rmdir()
    assert tierctl.main(["reload", "--socket", socket]) == 0


def test_layers_lists_every_layer_of_a_model(
    socket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tierctl.main(["layers", "tiny", "--socket", socket]) == 0
    table = capsys.readouterr().out
    assert "model.layers.1" in table
    assert "model.embed_tokens" in table


def test_pin_unpin_and_evict_by_pattern(socket: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tierctl.main(["pin", "tiny", "model.layers.*", "--socket", socket]) == 0
    assert "pinned 2 layers" in capsys.readouterr().out
    assert tierctl.main(["layers", "tiny", "--socket", socket]) == 0
    assert capsys.readouterr().out.count(", pinned") == 2
    assert tierctl.main(["unpin", "tiny", "model.layers.1", "--socket", socket]) == 0
    capsys.readouterr()
    assert tierctl.main(["evict", "tiny", "--socket", socket]) == 1
    assert "model.layers.0 stays" in capsys.readouterr().out
    assert tierctl.main(["unpin", "tiny", "--socket", socket]) == 0
    assert tierctl.main(["pin", "tiny", "nothing", "--socket", socket]) == 1
    assert "nothing" in capsys.readouterr().err


def test_a_budget_is_changed_by_name_of_the_tier(
    socket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["budget", "--socket", socket]
    assert tierctl.main([*command, "dram", "48MiB", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["budget_bytes"] == 48 << 20
    assert tierctl.main([*command, "dram", "64MiB"]) == 0
    assert capsys.readouterr().out.startswith("the budget is 64.0 MiB, ")
    assert tierctl.main([*command, "dram", "64 potatoes"]) == 2
    assert "'64 potatoes' has no unit" in capsys.readouterr().err
    assert tierctl.main([*command, "gpu:0", "1GiB"]) == 1
    assert "there is no tier gpu:0 here; there are dram" in capsys.readouterr().err


def test_a_model_that_is_not_served_is_refused_by_name(
    socket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tierctl.main(["layers", "nobody", "--socket", socket]) == 1
    assert "nobody" in capsys.readouterr().err


def test_the_socket_may_come_from_the_environment(socket: str) -> None:
    environment = dict(os.environ, TIERD_SOCKET=socket)
    argv = [sys.executable, "-m", "tierd_tools.tierctl", "status"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    assert socket in done.stdout


def test_tierctl_imports_no_torch() -> None:
    code = (
        "import sys; from tierd_tools import tierctl\n"
        "for argv in (['verify', '/nowhere'], ['status', '--socket', '/nowhere']):\n"
        "    tierctl.main(argv)\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
