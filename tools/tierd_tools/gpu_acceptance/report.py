"""What the acceptance found, as Markdown for people and as one JSON."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

Cells = dict[str, Any]


@dataclass(slots=True)
class Tests:
    """What pytest's own report says."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)  #: by reason

    @property
    def text(self) -> str:
        skipped = sum(self.skipped.values())
        return f"{self.passed} passed, {len(self.failed)} failed, {skipped} skipped"


def read_tests(junit: Path) -> Tests | None:
    """None where pytest wrote none."""
    try:
        root = ElementTree.parse(junit).getroot()
    except (OSError, ElementTree.ParseError):
        return None
    tests = Tests()
    for case in root.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        skipped = case.find("skipped")
        problem = case.find("failure")
        problem = problem if problem is not None else case.find("error")
        if problem is not None:
            lines = (problem.get("message") or "").splitlines()
            tests.failed.append(f"{name}: {lines[0] if lines else 'no text'}")
        elif skipped is not None:
            reason = skipped.get("message") or "no reason given"
            tests.skipped[reason] = tests.skipped.get(reason, 0) + 1
        else:
            tests.passed += 1
    return tests


def tests_json(several: list[Tests]) -> Cells | None:
    """All of them together; None where there are none."""
    if not several:
        return None
    total = Tests()
    for tests in several:
        total.passed += tests.passed
        total.failed += tests.failed
        for reason, count in tests.skipped.items():
            total.skipped[reason] = total.skipped.get(reason, 0) + count
    return {
        "text": total.text, "passed": total.passed,
        "failed": total.failed, "skipped": total.skipped,
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    card = machine["card"] or f"no GPU: {result['no_gpu']}"
    lines = [
        f"# GPU acceptance, {machine['date']}",
        "",
        f"{card}; driver {machine['driver'] or '-'}; {machine['processors']} x "
        f"{machine['processor']}; Linux {machine['linux']}; Python {machine['python']}; "
        f"torch {machine['packages']['torch'] or '-'}; source {machine['revision'] or 'unknown'}; "
        f"{result['seconds']:.0f} s in all",
        "",
        "| row | ours | theirs | unit | ratio | bound | met |",
        "|---|---|---|---|---|---|---|",
        *(_line(row) for row in result["rows"]),
        *_binding(result["rows"]),
        *(line for name, table in result["tables"].items() for line in _table(name, table)),
        "",
        "| part | seconds | outcome |",
        "|---|---|---|",
        *(
            f"| {part['name']} | {part['seconds']} of {part['allowed']} | "
            f"{_cell(part['reason'] or 'done')} |"
            for part in result["parts"]
        ),
        *_tests(result["tests"]),
        *_answers(result["answers"]),
        *_doctor(result["doctor"]),
    ]
    return "\n".join(lines) + "\n"


def _line(row: Cells) -> str:
    bound = "-"
    if row.get("at_least") is not None:
        bound = f">= {row['at_least']:g}"
    elif row.get("at_most") is not None:
        bound = f"<= {row['at_most']:g}"
    why = row.get("reason") or "-"
    if row["ours"] is None and row.get("reason"):
        why = f"not run on hardware: {why}"
    met = {True: "yes", False: "**NO**", None: why}[row["met"]]
    figures = [_figure(row[key]) for key in ("ours", "theirs")]
    ratio = _figure(row["ratio"])
    return f"| {_cell(row['row'])} | {figures[0]} | {figures[1]} | {row['unit']} | {ratio} | {bound} | {_cell(met)} |"  # noqa: E501


def _binding(rows: list[Cells]) -> Iterator[str]:
    """Of each row that has it; those that missed their bound come first."""
    bound = sorted(
        (row for row in rows if row.get("binds")), key=lambda row: row["met"] is not False
    )
    if not bound:
        return
    yield from ("", "What binds the rows (those that missed their bound first):", "")
    for row in bound:
        missed = " MISSED" if row["met"] is False else ""
        yield f"- {_cell(row['row'])}:{missed} {_cell(row['binds'])}"


def _table(name: str, table: str) -> Iterator[str]:
    yield from ("", f"Table of `{name}`:", "")
    yield from table.splitlines()


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _cell(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else "").replace("|", "/")


def _tests(tests: Cells | None) -> Iterator[str]:
    yield from ("", "Tests marked `gpu`:", "")
    if tests is None:
        yield "- pytest wrote no report (see its part above)"
        return
    yield f"- {tests['text']}"
    yield from (f"- FAILED {_cell(name)}" for name in tests["failed"])
    yield from (f"- skipped {count}: {_cell(why)}" for why, count in tests["skipped"].items())


def _answers(answers: list[Cells]) -> Iterator[str]:
    yield from ("", "What the probes found (`tests/gpu/test_probe_*.py`):", "")
    if not answers:
        yield "- nothing was asked: no probe ran"
    yield from (f"- {_cell(one['question'])} {_cell(one['answer'])}" for one in answers)


def _doctor(doctor: Cells | None) -> Iterator[str]:
    yield from ("", "The doctor:", "")
    if doctor is None:
        yield "- it did not run to its end (see its part above)"
        return
    for finding in doctor["findings"]:
        yield f"- {finding['name']}: {finding['verdict']}: {_cell(finding['text'])}"


def read_tables(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """What benchmarks wrote beside their rows: Markdown, by benchmark."""
    paths = {name: folder / f"{name}.md" for name in names}
    return {name: path.read_text() for name, path in paths.items() if path.is_file()}


def read_answers(path: Path) -> list[Cells]:
    """One JSON line for each question."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except OSError:
        return []
