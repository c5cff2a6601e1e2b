"""The benchmarks of the GPU tier: rows where there is no GPU, and shared memory in its place."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import pytest

from tierd_tools import gpu_ground
from tierd_tools.bench import gpu_acquire, gpu_copy, gpu_memory
from tierd_tools.bench.__main__ import modules, names
from tierd_tools.doctor import nvidia
from tierd_tools.gpu_acceptance.promises import PROMISES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Measure = Callable[[str, int], tuple[tuple[float, float], tuple[float, float]]]

WITHOUT_GPU = nvidia.Nvidia((), None, nvidia.Started(problem="no libcuda"))


@pytest.fixture
def _memfd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TIERD_BENCH_DEVICE", "memfd")
    monkeypatch.chdir(tmp_path)  # where packs and logs go


@pytest.mark.parametrize("name", PROMISES)
def test_without_a_gpu_every_row_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIERD_BENCH_DEVICE", raising=False)
    monkeypatch.setattr(nvidia, "look", lambda: WITHOUT_GPU)
    rows = import_module(f"tierd_tools.bench.{name}").run()
    assert [row.row for row in rows] == [promise.row for promise in PROMISES[name]]
    assert {row.not_applicable for row in rows} == {"no GPU: no libcuda"}
    assert {row.met for row in rows} == {None}


def test_all_of_them_are_parts_of_one() -> None:
    assert "gpu" in names()
    assert set(PROMISES) <= set(modules()) - set(names())


def test_a_device_that_there_is_none_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERD_BENCH_DEVICE", "rocm")
    with pytest.raises(ValueError, match="rocm"):
        gpu_ground.ground()


@pytest.mark.usefixtures("_memfd")
def test_acquires_are_measured_on_both_tiers_but_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gpu_acquire, "_measure", _one_client(gpu_acquire._measure))
    rows = gpu_acquire.run()
    assert all(row.ratio and row.ratio < 10 for row in rows)
    assert {row.met for row in rows} == {None}
    assert rows[0].not_applicable == "measured on shared memory, not on a GPU"


def _one_client(measure: Measure) -> Measure:
    """Processes take seconds to start: once is enough."""
    found: list[tuple[tuple[float, float], tuple[float, float]]] = []

    def once(socket: str, clients: int) -> tuple[tuple[float, float], tuple[float, float]]:
        if not found:
            found.append(measure(socket, 1))
        return found[0]

    return once


@pytest.mark.usefixtures("_memfd")
def test_copies_reach_what_the_device_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_copy, "SECONDS", 1.0)
    monkeypatch.setattr(gpu_copy, "MEMFD_BANDWIDTH", 100_000_000)
    (row,) = gpu_copy.run()
    assert row.ratio is not None
    assert 0.5 < row.ratio <= 1.1


@pytest.mark.usefixtures("_memfd")
def test_a_daemon_with_a_gpu_is_measured_against_one_without() -> None:
    memory, ready = gpu_memory.run()
    assert memory.ratio is not None
    assert 0.8 < memory.ratio < 2
    assert ready.ours is not None
