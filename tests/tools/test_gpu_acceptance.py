"""`make gpu-acceptance`: on a machine without a GPU it ends, and says so in every row."""

from __future__ import annotations

import json
import sys
import time
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierd_tools.benchmark import Row
from tierd_tools.gpu_acceptance import __main__ as acceptance
from tierd_tools.gpu_acceptance import environment, report
from tierd_tools.gpu_acceptance.parts import Outcome, Parts, Running
from tierd_tools.gpu_acceptance.promises import PROMISES, Promise

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parents[2]


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def as_promised(promise: Promise, times: float) -> dict[str, Any]:
    """A row whose ratio is so many times its bound."""
    bounds = [bound for bound in (promise.at_least, promise.at_most) if bound is not None]
    figures = (1.0, times * (bounds or [1.0])[0])
    ours, theirs = figures if promise.invert else figures[::-1]
    return promise.measured(ours, theirs).as_json()


# ----------------------------------------------------------------------------------- the whole run


def run(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    *options: str,
    build: str = "pass",
    problem: str = "no libcuda",
) -> tuple[int, dict[str, Any]]:
    """The exit status and the JSON of a run whose build is a program, on a machine whose driver
    has this problem."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(environment.Environment, "install", lambda self, folder: python(build))
    monkeypatch.setattr(environment, "NEEDED", ())
    monkeypatch.setattr(acceptance, "_LOOK", f"print({problem!r})")
    monkeypatch.setattr(acceptance, "BENCH_OUT", out / "bench")
    few = ["--out", str(out), "--tests", "tests/gpu/test_probe_ipc.py"]
    status = acceptance.main([*few, *options])
    return status, json.loads((out / "acceptance.json").read_text())


def test_without_a_gpu_it_runs_to_its_end_and_every_row_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = run(tmp_path, monkeypatch)
    assert status == 0
    assert [row["row"] for row in found["rows"]] == [
        promise.row for promises in PROMISES.values() for promise in promises
    ]
    assert {row["reason"] for row in found["rows"]} == {"no GPU: no libcuda"}
    assert {"date", "driver", "card"} <= set(found["machine"])
    assert found["tests"]["passed"] == 0
    assert not found["tests"]["failed"]
    assert found["doctor"]["findings"]
    table = (tmp_path / "acceptance.md").read_text()
    assert table in capsys.readouterr().out
    assert table.count("| not run on hardware: no GPU: no libcuda |") == len(found["rows"])
    assert table.count("| no GPU: no libcuda |") == len(PROMISES) + 1
    for name in ("build", "look", "tests", "doctor", "models", *PROMISES):
        assert f"| {name} |" in table


def test_what_cannot_be_built_fails_and_names_the_reason_in_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, found = run(tmp_path, monkeypatch, build="raise SystemExit('no compiler')")
    assert status == 1
    assert all("no compiler" in row["reason"] for row in found["rows"])
    assert found["tests"] is None
    assert any("no compiler" in line for line in found["failed"])


def test_rows_that_a_benchmark_writes_are_taken_and_missed_bounds_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bench(self: Any, name: str, why: str | None) -> list[dict[str, Any]]:
        assert why is None
        slow = name == "gpu_killed"
        return [as_promised(promise, 2.0 if slow else 1.0) for promise in PROMISES[name]]

    monkeypatch.setattr(acceptance.Acceptance, "_bench", bench)
    made = Outcome("models", 0.0, 1.0, 0, "", "")
    monkeypatch.setattr(acceptance.Acceptance, "_models", lambda self, models, why: made)
    status, found = run(tmp_path, monkeypatch, problem="")
    assert status == 1
    assert found["failed"] == ["slots of a killed client are reused, against the bound: 2"]


def test_parts_that_were_not_chosen_are_skipped_and_are_no_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = tmp_path / "bench" / "gpu_expand.json"
    program = (
        f"import pathlib; path = pathlib.Path({str(said)!r}); path.parent.mkdir(exist_ok=True);"
        "path.write_text('[]'); path.with_suffix('.md').write_text('| a table |')"
    )
    real = Parts.run

    def bench(self: Parts, name: str, seconds: float, command: list[str], **rest: Any) -> Outcome:
        return real(self, name, seconds, python(program) if name in PROMISES else command, **rest)

    monkeypatch.setattr(Parts, "run", bench)
    status, found = run(tmp_path, monkeypatch, "--only", "gpu_expand", problem="")
    assert status == 0
    assert found["tables"] == {"gpu_expand": "| a table |"}
    assert {row["reason"] for row in found["rows"]} == {"not chosen: ONLY=gpu_expand"}
    reasons = {part["name"]: part["reason"] for part in found["parts"]}
    assert [name for name, reason in reasons.items() if not reason] == [
        "build", "look", "gpu_expand",
    ]  # fmt: skip
    assert "| a table |" in (tmp_path / "acceptance.md").read_text()


def test_a_part_that_there_is_none_of_is_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert acceptance.main(["--out", str(tmp_path), "--only", "gpu_expand gpu_speed"]) == 2
    assert "no part gpu_speed; there are: wheels, " in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- parts


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    parts = Parts(60, tmp_path, {})
    marker = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(marker)!r}, 'w')"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = parts.run("slow", 1.1, python(program))
    assert outcome.status is None
    assert "did not end within 1 s" in outcome.reason
    time.sleep(1.5)
    assert not marker.exists()


def test_what_a_part_leaves_over_later_ones_may_use(tmp_path: Path) -> None:
    parts = Parts(60, tmp_path, {})
    parts.skip("first", 20, "not here")
    assert parts.run("second", 5, python("pass")).allowed > 20


def test_a_part_may_run_beside_others_and_has_its_own_time(tmp_path: Path) -> None:
    parts = Parts(60, tmp_path, {})
    beside = parts.start("beside", 30, python("import time; time.sleep(0.5); exit(3)"))
    assert isinstance(beside, Running)
    assert not parts.run("other", 5, python("pass")).reason
    assert parts.finish(beside).status == 3
    assert [outcome.name for outcome in parts.outcomes] == ["other", "beside"]


def test_what_others_leave_over_is_not_all_for_one_that_hangs(tmp_path: Path) -> None:
    parts = Parts(60, tmp_path, {})
    parts.skip("first", 40, "not here")
    program = "import os, time; print(os.environ['TIERD_PART_SECONDS'], flush=True); time.sleep(9)"
    outcome = parts.run("hangs", 1, python(program), most=1.5)
    assert outcome.reason == "it did not end within 2 s"
    assert (tmp_path / "hangs.log").read_text() == "2\n"


def test_no_part_begins_after_the_time_of_all(tmp_path: Path) -> None:
    parts = Parts(0.5, tmp_path, {})
    outcome = parts.run("late", 30, python("pass"))
    assert outcome.status is None
    assert "were used up" in outcome.reason


def test_a_part_that_fails_shows_the_end_of_what_it_said(tmp_path: Path) -> None:
    parts = Parts(60, tmp_path, {})
    outcome = parts.run("broken", 30, python("raise SystemExit('the reason')"))
    assert outcome.reason == "it ended with 1: the reason"
    said = tmp_path / "said"
    assert not parts.run("good", 30, python("print(3); exit(5)"), (0, 5), said).reason
    assert said.read_text() == "3\n"


# -------------------------------------------------------------------------------------- environment


def test_wheels_are_taken_for_what_the_node_lacks_and_for_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = ["nanobind-3.1.0-py3-none-any.whl", "pytest_asyncio-1.5.0-py3-none-any.whl"]
    for wheel in (*taken, "numpy-2.5.0-cp312-cp312-linux.whl"):
        (tmp_path / wheel).touch()

    def version(name: str) -> str:
        if name in ("pytest-asyncio", "xxhash"):
            raise PackageNotFoundError(name)
        return "2.9.2"

    monkeypatch.setattr(environment, "version", version)
    found = environment.prepare(tmp_path / "site", tmp_path)
    assert [path.name for path in found.wheels] == taken  # what builds is too old
    assert found.take_wheels()[-2:] == [str(tmp_path / name) for name in taken]
    assert found.missing == ("xxhash",)
    assert found.problem is not None
    assert "xxhash" in found.problem
    command = found.install(tmp_path / "cmake")
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(command)
    assert found.variables["PYTHONPATH"].split(":")[0] == str(tmp_path / "site")


def test_a_folder_without_wheels_is_usage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert acceptance.main(["--out", str(tmp_path), "--wheels", str(tmp_path)]) == 2
    assert "holds no wheel" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- report


def test_pytests_report_is_counted_with_reasons(tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    junit.write_text(
        "<testsuites><testsuite>"
        "<testcase classname='a' name='one'/>"
        "<testcase classname='a' name='two'><failure message='assert 1&#10;more'/></testcase>"
        "<testcase classname='a' name='three'><skipped message='no GPU'/></testcase>"
        "<testcase classname='a' name='four'><skipped message='no GPU'/></testcase>"
        "<testcase classname='a' name='five'><error message='broke'/></testcase>"
        "</testsuite></testsuites>"
    )
    found = report.read_tests(junit)
    assert found is not None
    assert found.text == "1 passed, 2 failed, 2 skipped"
    assert found.failed == ["a::two: assert 1", "a::five: broke"]
    assert found.skipped == {"no GPU": 2}
    assert report.read_tests(tmp_path / "none.xml") is None
    both = report.tests_json([found, found])
    assert both is not None
    assert both["text"] == "2 passed, 4 failed, 4 skipped"
    assert both["skipped"] == {"no GPU": 4}
    assert report.tests_json([]) is None


def test_what_was_not_run_and_what_binds_is_said_in_words() -> None:
    rows = [
        Row("fast", 2.0, 1.0, "us", at_least=1.5, binds="bytes: 3 MB").as_json(),
        Row("slow", 1.0, 1.0, "us", at_least=1.5, binds="instructions | many").as_json(),
        Row("absent", None, None, "us", not_applicable="no Triton").as_json(),
        Row("played", 1.0, 1.0, "us", not_applicable="measured on shared memory").as_json(),
    ]
    lines = [*map(report._line, rows), *report._binding(rows)]
    assert "| not run on hardware: no Triton |" in lines[2]
    assert "| measured on shared memory |" in lines[3]
    assert lines[-2:] == ["- slow: MISSED instructions / many", "- fast: bytes: 3 MB"]
