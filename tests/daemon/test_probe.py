"""The probe of a device: bounded, and never in anybody's way."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

import pytest

from tierd.core.cost import MIB
from tierd.io.probe import MOST_BYTES, POINTS, Probe, ProbeResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PATIENT_NS = 6_000_000_000  #: a test machine may be busy


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file large enough for every point, as sparse as the file system makes it."""
    path = tmp_path_factory.mktemp("probe") / "shard"
    with path.open("wb") as file:
        file.truncate(96 * MIB)
    yield path
    path.unlink()


def probe(
    path: Path,
    *,
    go_on: Callable[[], bool] = lambda: True,
    limit: int | None = None,
    flags: int = os.O_DIRECT,
) -> ProbeResult:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        measuring = Probe([fd], go_on, limit, PATIENT_NS)
    finally:
        os.close(fd)  # it has its own
    return measuring.run()


def test_points_are_measured_within_the_bounds(shard: Path) -> None:
    result = probe(shard)
    assert result.samples
    assert 0 < result.read_bytes <= MOST_BYTES
    assert {(sample.chunk_bytes, sample.depth) for sample in result.samples} <= {
        (chunk, depth) for chunk, depth, _ in POINTS
    }
    assert all(sample.bytes_per_s > 0 for sample in result.samples)
    assert result.reason == ""


def test_all_points_together_stay_below_the_bound() -> None:
    assert sum(chunk * reads for chunk, _, reads in POINTS) <= MOST_BYTES


def test_nothing_is_read_while_clients_wait(shard: Path) -> None:
    result = probe(shard, go_on=lambda: False)
    assert result.read_bytes == 0
    assert result.samples == ()
    assert "clients" in result.reason


def test_it_stops_at_the_next_read_when_a_client_comes(shard: Path) -> None:
    asked = 0

    def go_on() -> bool:
        nonlocal asked
        asked += 1
        return asked < 6

    result = probe(shard, go_on=go_on)
    assert result.read_bytes <= 5 * 4 * MIB


def test_a_limit_holds_for_the_probe_too(shard: Path) -> None:
    limit = 200 * MIB
    result = probe(shard, limit=limit)
    burst = 4 * MIB
    assert result.read_bytes <= limit * result.duration_ns / 1e9 + 2 * burst
    assert {sample.depth for sample in result.samples} == {1}


def test_a_file_that_is_too_small_says_so(tmp_path: Path) -> None:
    path = tmp_path / "tiny"
    path.write_bytes(bytes(MIB))
    result = probe(path)
    assert (result.samples, result.read_bytes) == ((), 0)
    assert "too small" in result.reason


def test_without_direct_reads_nothing_is_measured(shard: Path) -> None:
    result = probe(shard, flags=0)
    assert result.samples == ()
    assert "O_DIRECT" in result.reason


def test_no_descriptor_is_left_open(shard: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    probe(shard)
    probe(shard, go_on=lambda: False)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("good_reads", [0, 20])
def test_a_read_that_fails_is_the_reason_and_ends_the_probe(
    shard: Path, monkeypatch: pytest.MonkeyPatch, good_reads: int
) -> None:
    really, reads = os.preadv, iter(range(1 << 30))

    def preadv(fd: int, targets: list[memoryview], offset: int) -> int:
        if next(reads) >= good_reads:
            raise OSError(errno.EIO, "Input/output error")
        return really(fd, targets, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    result = probe(shard)
    assert result.samples == ()
    assert "Input/output error" in result.reason
