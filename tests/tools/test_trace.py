"""`tierctl why`, `trace` and `replay` against a daemon at work."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]
import pytest

import tierd_client
from tests.tools.test_trace_tracks import check_format
from tierd.sim.recording import Recording
from tierd_tools import random_model, tierctl, trace
from tierd_tools.serving import serve

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def socket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("packs")
    random_model.write_pack(folder / "tiny", random_model.TINY)
    with serve(["--models", str(folder), "--dram", "64MiB"], folder / "log") as daemon:
        yield daemon.socket


def one_pass(socket: str) -> int:
    """A client goes through the model once; how many layers it has."""
    with tierd_client.Client(socket, name="walker") as client:
        opened = client.open("tiny")
        layers = range(len(opened.index.layers))
        opened.plan(layers)
        for layer in layers:
            opened.acquire(layer).release()
        return len(layers)


def test_a_trace_goes_into_what_is_no_file_and_never_replaces_it(
    socket: str, tmp_path: Path, capsys: Capture
) -> None:
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    link.symlink_to(target)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    assert tierctl.main(["trace", "-o", str(pipe), "--socket", socket]) == 0
    reader.join()
    assert "traceEvents" in json.loads(read[0])
    assert pipe.is_fifo()
    assert tierctl.main(["trace", "-o", str(link), "--socket", socket]) == 0
    assert link.is_symlink()
    assert "traceEvents" in json.loads(target.read_text())
    assert tierctl.main(["trace", "-o", str(tmp_path), "--socket", socket]) == 1
    assert sorted(tmp_path.iterdir()) == [link, pipe, target]
    assert not tmp_path.with_name(f"{tmp_path.name}.partial").exists()


def test_a_trace_of_a_daemon_is_drawn_and_can_be_replayed(
    socket: str, tmp_path: Path, capsys: Capture
) -> None:
    layers = one_pass(socket)
    path = tmp_path / "day.json"
    assert tierctl.main(["trace", "-o", str(path), "--socket", socket]) == 0
    assert "perfetto" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [path]
    document = json.loads(path.read_text())
    check_format(document["traceEvents"])
    names = {event["args"]["name"] for event in document["traceEvents"] if event["ph"] == "M"}
    assert {"tier dram", "ssd", "clients", "reader 1"} <= names
    data = document["otherData"]
    assert (data["gaps"], data["forgotten_events"]) == ([], 0)
    assert data["status"]["ssd"]["reads"] >= layers
    recording = Recording.read(path)
    assert recording.config.budget_bytes == 64 << 20
    assert len(recording.moments) == len(data["entries"])

    assert tierctl.main(["replay", str(path)]) == 0
    printed = capsys.readouterr().out
    for word in ("next-use", "lru", "lfu", "mru", "pin-first-n", "min", "HITS", "STALL"):
        assert word in printed
    argv = ["replay", str(path), "--json", "--policy", "lru", "--policy", "min"]
    argv += ["--dram", "64MiB", "--dram", "1GiB", "--ssd-bandwidth", "1GB/s"]
    assert tierctl.main(argv) == 0
    reply = json.loads(capsys.readouterr().out)
    rows = [(row["policy"], row["budget_bytes"], row["bandwidth"]) for row in reply["rows"]]
    assert rows == [(policy, size << 20, 10**9) for size in (64, 1024) for policy in ("lru", "min")]
    assert all(row["uses"] >= layers for row in reply["rows"])


def test_a_trace_goes_on_for_as_long_as_it_is_told(socket: str, tmp_path: Path) -> None:
    walker = threading.Timer(0.3, one_pass, [socket])
    walker.start()
    before = trace.trace(socket, tmp_path / "before.json")
    written = trace.trace(socket, tmp_path / "day.json", seconds=1.5)
    walker.join()
    after = trace.trace(socket, tmp_path / "after.json")
    assert before.entries < written.entries == after.entries
    assert written.missed == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_trace_that_is_ended_before_its_time_leaves_no_file(
    socket: str, tmp_path: Path, number: signal.Signals
) -> None:
    path = tmp_path / "day.json"
    argv = ["trace", "-o", str(path), "--socket", socket, "--seconds", "60"]
    command = [sys.executable, "-m", "tierd_tools.tierctl", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 20
        while not list(tmp_path.iterdir()):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(20) == (143 if number == signal.SIGTERM else 1)
    assert list(tmp_path.iterdir()) == []


def test_what_the_ring_forgot_between_two_pages_is_counted(tmp_path: Path) -> None:
    def page(first: int, end: int, kept: int, numbers: list[int]) -> dict[str, Any]:
        items = [msgpack.packb([n, n, ["@Tick", n], [], []]) for n in numbers]
        return {"items": items, "next": first + len(items), "end": end, "first": kept}

    entries = [page(10, 20, 10, [10, 11]), page(15, 17, 15, [15, 16]), page(17, 17, 15, [])]

    def ask(op: str, part: str, tier: str, first: int = 0) -> dict[str, Any]:
        assert (op, tier) == ("trace", "dram")
        if part == "entries":
            return entries.pop(0)
        return {"items": [], "next": 0, "end": 20, "first": 10, "clients": []}

    found = trace.fetch(ask, 0.0)
    assert [entry[0] for entry in found.entries] == [10, 11, 15, 16]
    assert found.gaps == [[12, 15]]
    assert found.forgotten == 10


def test_why_is_a_sentence_and_with_history_the_decisions(socket: str, capsys: Capture) -> None:
    one_pass(socket)
    argv = ["why", "tiny", "model.layers.1", "--socket", socket]
    assert tierctl.main(argv) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("model.layers.1 of tiny (")
    assert "is resident since" in line
    assert tierctl.main([*argv, "--history"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(" read " in line for line in lines[1:])
    assert "the record reaches back" in lines[-1]
    assert tierctl.main([*argv, "--json"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply["sentence"].endswith(".")
    assert reply["state"] == "resident"
    assert {told["what"] for told in reply["history"]} >= {"read", "resident", "grant"}


def test_what_cannot_be_answered_is_one_line_and_a_code(
    socket: str, tmp_path: Path, capsys: Capture
) -> None:
    stray = tmp_path / "stray.json"
    stray.write_text('{"traceEvents": []}')
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"otherData": {"format": "tierd-trace", "version": 1}}')
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    trace.trace(socket, tmp_path / "day.json")
    day = json.loads((tmp_path / "day.json").read_text())
    changed = {name: copy.deepcopy(day) for name in ("config", "time", "event", "kind")}
    changed |= {name: copy.deepcopy(day) for name in ("configs", "range", "float")}
    changed["config"]["otherData"]["config"]["granule_bytes"] = 0
    changed["time"]["otherData"]["entries"].reverse()
    changed["event"]["otherData"]["entries"].insert(0, day["otherData"]["entries"][0])
    changed["configs"]["otherData"]["config"] = 1.5
    changed["float"]["otherData"]["entries"][-1][1] = float("nan")
    acquire = ["Acquire" in str(event) for _, _, event, *_ in day["otherData"]["entries"]].index(
        True
    )
    changed["kind"]["otherData"]["entries"][acquire][2][4] = {}
    changed["range"]["otherData"]["entries"][acquire][2][4] = ["@LayerKey", 1, 99]
    for name, document in changed.items():
        (tmp_path / name).write_text(json.dumps(document))
    for argv, code, text in (
        (["why", "tiny", "nothing", "--socket", socket], 1, "has no layer 'nothing'"),
        (["why", "nothing", "0", "--socket", socket], 1, "no model 'nothing'"),
        (["why", "tiny", "9" * 25, "--socket", socket], 1, "has no layer '999"),
        (["why", "tiny", "9" * 4000, "--socket", socket], 1, "has no layer '999"),
        (["trace", "-o", str(tmp_path / "x"), "--seconds", "-1", "--socket", socket], 2, "-1"),
        (["trace", "-o", str(tmp_path / "no" / "x"), "--socket", socket], 1, "no/x: No such file"),
        (["trace", "-o", str(tmp_path / "x"), "--socket", str(tmp_path / "s")], 1, "s"),
        (["replay", str(stray)], 1, "not from `tierctl trace`"),
        (["replay", str(damaged)], 1, "damaged"),
        (["replay", str(deep)], 1, "no JSON document"),
        (["replay", str(tmp_path / "config")], 1, "granule_bytes is 0"),
        (["replay", str(tmp_path / "event")], 1, "is no day of a daemon"),
        (["replay", str(tmp_path / "time")], 1, "its time runs backwards"),
        (["replay", str(tmp_path / "configs")], 1, "is damaged"),
        (["replay", str(tmp_path / "float")], 1, "a time is no whole number"),
        (["replay", str(tmp_path / "kind")], 1, "is damaged"),
        (["replay", str(tmp_path / "range")], 1, "is damaged, it cannot be replayed"),
        (["replay", str(tmp_path / "none")], 1, "No such file"),
        (["replay", str(stray), "--dram", "lots"], 2, "'lots' is not a size"),
    ):
        assert tierctl.main(argv) == code
        errors = capsys.readouterr().err
        assert text in errors
        assert errors.count("\n") == 1


def test_a_trace_has_tracks_of_its_own_for_each_gpu(tmp_path: Path, capsys: Capture) -> None:
    random_model.write_pack(tmp_path / "packs" / "tiny", random_model.TINY)
    arguments = ["--models", str(tmp_path / "packs"), "--dram", "64MiB"]
    arguments += ["--gpu", "0=64MiB", "--gpu", "1=64MiB", "--gpu-device", "memfd"]
    path = tmp_path / "day.json"
    with serve(arguments, tmp_path / "log") as daemon:
        with tierd_client.Client(daemon.socket, tier="gpu:1", name="walker") as client:
            opened = client.open("tiny")
            layers = range(len(opened.index.layers))
            opened.plan(layers)
            for layer in layers:
                opened.acquire(layer).release()
        assert tierctl.main(["trace", "-o", str(path), "--socket", daemon.socket]) == 0
    document = json.loads(path.read_text())
    check_format(document["traceEvents"])
    names = {
        event["args"]["name"]: event["pid"]
        for event in document["traceEvents"]
        if event["name"] == "process_name"
    }
    assert {"tier dram", "ssd", "clients"} <= names.keys()
    assert {"tier gpu:1", "copies to gpu:1", "clients of gpu:1"} <= names.keys()
    assert len(set(names.values())) == len(names)
    drawn = document["traceEvents"]
    copies = [e for e in drawn if e["pid"] == names["copies to gpu:1"] and e["ph"] == "X"]
    assert len(copies) == len(layers)
    used = [e for e in drawn if e["pid"] == names["clients of gpu:1"] and e.get("cat") == "compute"]
    assert len(used) == len(layers)
    assert min(e["ts"] for e in drawn if "ts" in e) == 0
    assert Recording.read(path).moments, "the day of DRAM can be replayed"
    capsys.readouterr()
    for tier in ("dram", "gpu:1"):
        assert tierctl.main(["replay", str(path), "--tier", tier, "--json"]) == 0
        reply = json.loads(capsys.readouterr().out)
        [row] = [row for row in reply["rows"] if row["policy"] == "next-use"]
        assert reply["tier"] == tier
        assert row["uses"] == len(layers)
    assert tierctl.main(["replay", str(path), "--tier", "gpu:7"]) == 1
    assert "it has those of dram, gpu:0, gpu:1" in capsys.readouterr().err
