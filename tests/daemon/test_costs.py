"""What a daemon finds out about its devices, and what it does with it."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.conftest import MIB, wait_until, write_pack
from tierd.config import load
from tierd.costs import Costs
from tierd.io.ssd_lane import DeviceStatistics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon.conftest import OpenedModel, RawClient, RunningDaemon

    Start = Callable[..., RunningDaemon]
    Connect = Callable[..., RawClient]

LAYERS = 10
PLAN = list(range(LAYERS))


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("costs")
    write_pack(folder / "large", layers=LAYERS, nbytes=8 * MIB)
    write_pack(folder / "tiny")
    return folder


def device_of(daemon: RunningDaemon) -> dict[str, Any]:
    [device] = daemon.status()["ssd"]["devices"]
    return dict(device)


def run_through(opened: OpenedModel, passes: int = 1) -> None:
    for layer in PLAN * passes:
        opened.client.call("release", leases=[opened.acquire(layer)["lease"]])


def test_real_reads_measure_a_device_and_the_choice_is_in_effect_and_shown(
    packs: Path, start_daemon: Start, connect: Connect
) -> None:
    daemon = start_daemon("--pack", packs / "large", "--dram", "200MiB")
    wait_until(lambda: device_of(daemon)["note"] != "not measured yet", "the probe ended")
    opened = connect(daemon).open("large")
    run_through(opened)
    device = wait_until(
        lambda: (found := device_of(daemon))["bytes_per_s"] and found, "80 MiB were read"
    )
    stat = os.stat(packs / "large")
    assert device["device"] == f"{os.major(stat.st_dev)}:{os.minor(stat.st_dev)}"
    assert device["given"] == []
    rows = {row["key"]: row for row in daemon.ask("config")["config"]}
    for key in ("readers", "read_chunk", "reads_in_flight"):
        assert rows[key] == {"key": key, "value": device[key], "source": "measured"}
    # Two layers of 8 MiB are asked for at a time: no larger window, at least two threads.
    assert device["readers"] * device["read_chunk"] <= 16 * MIB or device["read_chunk"] == MIB
    assert device["readers"] >= 2


def test_what_the_operator_set_stays_and_is_shown_as_set(
    packs: Path, start_daemon: Start, connect: Connect
) -> None:
    daemon = start_daemon(
        *("--pack", packs / "large", "--dram", "200MiB", "--readers", "3"),
        *("--read-chunk", "2MiB", "--reads-in-flight", "5"),
    )
    opened = connect(daemon).open("large")
    run_through(opened)
    device = wait_until(
        lambda: (found := device_of(daemon))["bytes_per_s"] and found, "80 MiB were read"
    )
    assert (device["readers"], device["read_chunk"], device["reads_in_flight"]) == (3, 2 * MIB, 5)
    assert device["given"] == ["read_chunk", "readers", "reads_in_flight"]
    rows = {row["key"]: row for row in daemon.ask("config")["config"]}
    assert rows["readers"]["source"] == "flag --readers"
    assert rows["read_chunk"]["value"] == 2 * MIB


def test_a_limit_is_known_to_what_is_predicted(
    packs: Path, start_daemon: Start, connect: Connect
) -> None:
    limit = 64 * MIB
    daemon = start_daemon(
        *("--pack", packs / "large", "--dram", "48MiB", "--ssd-bandwidth", str(limit))
    )
    opened = connect(daemon).open("large")
    opened.client.call("plan", model_id=opened.model_id, order=PLAN)
    run_through(opened, 2)
    device = device_of(daemon)
    assert device["bytes_per_s"] is not None
    assert device["bytes_per_s"] <= limit
    [client] = daemon.ask("clients")["clients"]
    found = client["predicted"]
    assert found["binds"] == "ssd"
    assert found["pass_ns"] == found["ns_per_token"] == found["ssd_ns"]
    assert found["stall_ns"] == found["pass_ns"] - found["compute_ns"]
    # Of 80 MiB between 32 (what does not fit) and 80 pass by.
    assert 0.5 * 10**9 <= found["ssd_ns"] <= 1.3 * 10**9


def test_a_pack_that_is_too_small_to_measure_changes_nothing(
    packs: Path, start_daemon: Start
) -> None:
    daemon = start_daemon("--pack", packs / "tiny", "--dram", "16MiB")
    wait_until(lambda: "too small" in device_of(daemon)["note"], "the probe ended")
    device = device_of(daemon)
    assert (device["bytes_per_s"], device["readers"], device["reads_in_flight"]) == (None, 4, 2)
    rows = {row["key"]: row for row in daemon.ask("config")["config"]}
    assert rows["readers"]["source"] == "default"
    assert rows["read_chunk"]["value"] == "auto"


def test_what_was_counted_before_its_layer_ended_delays_a_measurement_by_no_more_than_a_layer(
    tmp_path: Path,
) -> None:
    """Counters run ahead of ended layers, by 32 MiB here: chunks of layers that are under way."""
    counters = DeviceStatistics(4, MIB, 0, 0, 0, 0, 0, 0, ())
    config = load(["--models", str(tmp_path), "--socket", "/s"], {})
    measured: list[Any] = []
    played: dict[str, Any] = {
        "registry": SimpleNamespace(by_model={}),
        "pool": SimpleNamespace(
            chunk_bytes=MIB, devices=lambda: {7: counters}, configure=lambda **_: None
        ),
        "engine": SimpleNamespace(now=lambda: 0, submit=measured.append),
    }
    costs = Costs(config, **played, in_use=lambda: True)

    def read(nbytes: int, *, counted: int) -> int:
        nonlocal counters
        counters = replace(counters, read_bytes=counted, busy_ns=counted)
        costs.read_done(7, nbytes)
        return len(measured)

    assert read(64 * MIB, counted=96 * MIB) == 1
    assert read(64 * MIB, counted=128 * MIB) == 1, "since then 32 MiB were read"
    assert read(32 * MIB, counted=160 * MIB) == 2
