"""The fuzz targets without a fuzzer: seeded inputs for a few seconds. `make fuzz` goes on."""

import runpy
from pathlib import Path
from typing import Any

import pytest

fuzz = runpy.run_path(str(Path(__file__).with_name("fuzz_pack.py")))


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    found: dict[str, Any] = fuzz["targets"]()
    return found


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_a_wrong_file_is_refused_and_what_is_accepted_is_read_alike_by_all(first: int) -> None:
    """A failure's note says how to replay it."""
    runs = fuzz["run_random"](first, 100)
    assert sum(runs.values()) == 100


def test_random_inputs_reach_every_target_with_right_and_with_wrong_files(
    known: dict[str, Any],
) -> None:
    """A target that refuses everything, or accepts everything, tests nothing."""
    runs: dict[str, int] = fuzz["run_random"](10_000, 120)
    for name in ("matrix", "pack", "bitmask", "wire"):
        assert runs.get(name), f"no wrong input among {runs}"
        assert runs.get(f"{name} ok"), f"no right input among {runs}"
    assert set(fuzz["TURNS"]) == set(known)


def test_an_error_that_is_none_of_ours_is_a_finding_with_a_note_that_replays_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(data: bytes) -> None:
        raise IndexError("out of bounds")

    every = dict.fromkeys(fuzz["TURNS"], broken)
    monkeypatch.setitem(fuzz["run_random"].__globals__, "targets", lambda: every)
    with pytest.raises(IndexError) as caught:
        fuzz["run_random"](7, 1)
    assert caught.value.__notes__ == ["replay: python tests/fuzz/fuzz_pack.py --random 7 1"]
