"""The one form of a benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tierd_tools.bench import scheduler, scheduler_reads
from tierd_tools.bench.__main__ import main, modules, names
from tierd_tools.benchmark import Row, interleaved, write_json

if TYPE_CHECKING:
    from pathlib import Path


def test_a_ratio_is_ours_over_theirs_unless_less_is_better() -> None:
    assert Row("speed", ours=30, theirs=10, unit="GB/s").ratio == 3
    assert Row("time", ours=10, theirs=30, unit="s", invert=True).ratio == 3


@pytest.mark.parametrize(
    ("row", "met"),
    [
        (Row("fast enough", 4, 1, "x", at_least=4), True),
        (Row("too slow", 3.9, 1, "x", at_least=4), False),
        (Row("small enough", 1, 1, "x", at_most=1), True),
        (Row("too large", 1.01, 1, "x", at_most=1), False),
        (Row("only printed", 1, 1, "x"), None),
        (Row("no other side", 1, None, "x", at_least=1), None),
        (Row("not here", 1, 9, "x", at_least=1, not_applicable="no such device"), None),
    ],
)
def test_a_row_is_met_by_its_bound_and_undecided_without_one(row: Row, met: bool | None) -> None:
    assert row.met is met


def test_the_json_has_the_documented_keys(tmp_path: Path) -> None:
    rows = [
        Row("a", 2, 1, "GB/s", at_least=1.5),
        Row("b", 1, 2, "us", at_most=1, not_applicable="no clock"),
    ]
    write_json(tmp_path / "deep" / "name.json", rows)
    first, second = json.loads((tmp_path / "deep" / "name.json").read_text())
    assert first == {
        "row": "a",
        "ours": 2,
        "theirs": 1,
        "unit": "GB/s",
        "ratio": 2,
        "at_least": 1.5,
        "met": True,
    }
    assert second["at_most"] == 1
    assert second["met"] is None
    assert second["reason"] == "no clock"


def test_sides_take_turns() -> None:
    calls: list[str] = []
    interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1
    )
    assert calls == ["a", "b"] * 3


def test_an_unknown_benchmark_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-thing"]) == 2
    out = capsys.readouterr().out
    assert "no-such-thing" in out
    assert "acquire" in out


def test_the_first_benchmarks_are_there() -> None:
    assert {"acquire", "kernels", "offload", "scheduler", "ssd"} <= set(names())


def test_a_part_of_a_benchmark_runs_with_it_or_when_named() -> None:
    assert "scheduler_reads" in modules()
    assert "scheduler_reads" not in names()
    assert scheduler_reads in scheduler.PARTS


def test_the_clock_of_another_process_counts_its_work_and_not_its_sleep() -> None:
    program = "import time; [0 for _ in range(10**6)]; print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        busy = scheduler_reads.cpu_seconds(process.pid)
        own = time.process_time()
        while time.process_time() < own + 0.1:
            pass
        later = scheduler_reads.cpu_seconds(process.pid)
        process.kill()
    assert busy > 0.005
    assert later - busy < 0.1
