from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tierd_layouts.container import LayerBuilder, write_shard
from tierd_tools.pack_journal import JOURNAL_FILE, FinishedLayer, Journal

if TYPE_CHECKING:
    from pathlib import Path


def finished(folder: Path, name: str, shard: int = 3) -> FinishedLayer:
    builder = LayerBuilder(name)
    builder.add_dense(f"{name}.weight", "U8", (5,), b"12345")
    _, (layer,) = write_shard(folder / "s.safetensors", shard, [builder.finish()])
    return FinishedLayer(layer, {f"{name}.weight": "ab"}, (f"{name}.weight",), ("x",), ("y", "z"))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal.start(tmp_path, "job")
    for name in "abc":
        journal.add(finished(tmp_path, name))
    return journal


def test_a_journal_gives_back_what_was_recorded(tmp_path: Path, journal: Journal) -> None:
    found = Journal.load(tmp_path, "job")
    assert found is not None
    assert found.finished == journal.finished
    assert found.finished[1].shard == 3
    assert found.nbytes == 3 * 4096


def test_a_new_journal_is_there_before_its_first_layer(tmp_path: Path) -> None:
    Journal.start(tmp_path, "job")
    found = Journal.load(tmp_path, "job")
    assert found is not None
    assert found.finished == []


def test_another_job_has_no_journal_here(tmp_path: Path, journal: Journal) -> None:
    assert Journal.load(tmp_path, "other") is None
    assert Journal.load(tmp_path / "nowhere", "job") is None


def test_a_line_that_was_not_written_whole_is_forgotten_and_overwritten(
    tmp_path: Path, journal: Journal
) -> None:
    path = tmp_path / JOURNAL_FILE
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1  # of the last line
    # Without the newline alone the line would run into the next one.
    for cut in (start, start + 1, start + 20, len(whole) - 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        found = Journal.load(tmp_path, "job")
        assert found is not None
        count = 3 if cut == len(whole) - 1 else 2
        assert found.finished == journal.finished[:count]
        found.add(journal.finished[2])
        again = Journal.load(tmp_path, "job")
        assert again is not None
        assert again.finished == [*journal.finished[:count], journal.finished[2]]


@pytest.mark.parametrize("line", [0, 1, 2, 3])
def test_a_flipped_bit_ends_the_journal_before_its_line(
    tmp_path: Path, journal: Journal, line: int
) -> None:
    path = tmp_path / JOURNAL_FILE
    lines = path.read_bytes().split(b"\n")
    place = sum(len(text) + 1 for text in lines[:line]) + len(lines[line]) // 2
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    found = Journal.load(tmp_path, "job")
    if line == 0:
        assert found is None
    else:
        assert found is not None
        assert found.finished == journal.finished[: line - 1]


def test_layers_that_are_not_kept_are_gone_for_the_next_run_too(
    tmp_path: Path, journal: Journal
) -> None:
    journal.keep(1)
    found = Journal.load(tmp_path, "job")
    assert found is not None
    assert [layer.layer.name for layer in found.finished] == ["a"]
