"""The diagnostics: exactly the promised keys, and numbers that are true."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest

from tests.daemon.conftest import PackOnDisk, RawClient, RunningDaemon, wait_until, write_pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Connect = Callable[..., RawClient]

LAYER_BYTES = 256 << 10
BUDGET = 16 << 20


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[RunningDaemon, PackOnDisk]]:
    place = tmp_path_factory.mktemp("statistics")
    pack = write_pack(place / "models" / "tiny", 4, LAYER_BYTES)
    arguments = ["--models", str(place / "models"), "--dram", str(BUDGET)]
    daemon = RunningDaemon(str(place / "s"), place / "log", arguments).wait_ready()
    yield daemon, pack
    assert daemon.stop() == 0


def test_status_has_the_promised_keys(served: tuple[RunningDaemon, PackOnDisk]) -> None:
    status = served[0].status()
    del status["id"], status["ok"]
    assert set(status) == {
        "daemon", "dram", "ssd", "scheduler", "gpus", "models", "clients", "notes",
    }  # fmt: skip
    assert set(status["daemon"]) == {
        "pid", "version", "uptime_ns", "socket", "epoch", "rss_bytes", "user",
    }  # fmt: skip
    assert set(status["dram"]) == {
        "budget_bytes", "used_bytes", "peak_bytes", "resident_bytes", "leased_bytes",
        "in_flight_bytes", "quarantined_bytes", "pinned_bytes", "populated_bytes", "pages",
        "locked_bytes",
    }  # fmt: skip
    assert set(status["ssd"]) == {
        "read_bytes", "reads", "failed", "busy_ns", "bandwidth_limit", "devices",
    }  # fmt: skip
    assert set(status["scheduler"]) == {
        "grants", "hits", "misses", "later", "refusals", "evictions", "stall_ns",
    }  # fmt: skip
    assert any("mistakes only" in note for note in status["notes"])


def test_the_numbers_follow_what_a_client_does(
    served: tuple[RunningDaemon, PackOnDisk], connect: Connect
) -> None:
    daemon, pack = served
    before = daemon.status()
    opened = connect(daemon).open("tiny")
    leases = [opened.acquire(0), opened.acquire(1), opened.acquire(1)]
    after = daemon.status()
    assert after["dram"]["budget_bytes"] == BUDGET
    assert after["dram"]["leased_bytes"] == 2 * LAYER_BYTES
    assert after["dram"]["resident_bytes"] == 2 * LAYER_BYTES
    assert after["ssd"]["read_bytes"] - before["ssd"]["read_bytes"] == 2 * LAYER_BYTES
    grown = {key: after["scheduler"][key] - before["scheduler"][key] for key in after["scheduler"]}
    assert (grown["grants"], grown["hits"], grown["misses"]) == (3, 1, 2)
    assert grown["stall_ns"] == sum(lease["waited_ns"] for lease in leases) > 0
    (client,) = daemon.ask("clients")["clients"]
    assert client.pop("connected_ns") > 0
    assert client.pop("client") > 0
    assert client.pop("reserved_bytes") == LAYER_BYTES
    assert client == {
        "name": "test", "pid": os.getpid(), "uid": os.getuid(), "model": "tiny", "position": 1,
        "leases": 3, "leased_bytes": 2 * LAYER_BYTES, "stall_ns": grown["stall_ns"], "granted": 3,
        "predicted": None, "weight": 100, "read_bytes": 2 * LAYER_BYTES, "plan": None,
        "tokens_per_pass": None, "tier": "dram", "scratch_bytes": 0,
    }  # fmt: skip
    (model,) = daemon.ask("models")["models"]
    assert model.pop("model_id") == opened.model_id
    assert model == {
        "name": "tiny", "pack_bytes": 4 * LAYER_BYTES, "dense_bytes": 4 * LAYER_BYTES,
        "layers": 4, "resident_layers": 2, "clients": 1, "path": str(pack.path),
        "state": "served",
    }  # fmt: skip
    layers = daemon.ask("layers", model="tiny")
    assert layers["model"] == "tiny"
    assert layers["layers"][1] == {
        "layer": 1, "name": "model.layers.1", "bytes": LAYER_BYTES, "state": "resident",
        "leases": 2, "slot": leases[1]["slot"], "generation": leases[1]["generation"],
        "next_use": None, "pinned": False, "gpus": {},
    }  # fmt: skip
    assert layers["layers"][3]["state"] == "absent"


def test_the_budget_is_populated_in_the_background_up_to_what_the_packs_need(
    served: tuple[RunningDaemon, PackOnDisk],
) -> None:
    daemon, pack = served
    wait_until(
        lambda: daemon.status()["dram"]["populated_bytes"] >= pack.index.pack_bytes,
        "the arena is populated",
    )
    assert daemon.status()["dram"]["populated_bytes"] <= BUDGET


def test_config_names_every_value_and_its_source(
    served: tuple[RunningDaemon, PackOnDisk],
) -> None:
    rows = {row["key"]: row for row in served[0].ask("config")["config"]}
    assert rows["dram"] == {"key": "dram", "value": BUDGET, "source": "flag --dram"}
    assert rows["readers"]["source"] == "default"


def test_uptime_counts_from_the_start(served: tuple[RunningDaemon, PackOnDisk]) -> None:
    daemon = served[0]
    uptime_ns = daemon.status()["daemon"]["uptime_ns"]
    assert 0 < uptime_ns < (time.monotonic() - daemon.started_at) * 1e9
