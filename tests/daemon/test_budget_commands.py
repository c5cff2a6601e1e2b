"""Budgets that are changed while clients hold leases and have chunks mapped."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon import as_nobody
from tests.daemon.conftest import MIB, RunningDaemon, wait_until, write_pack
from tests.daemon.gpu_daemon import (
    CHUNK,
    LAYER_BYTES,
    LAYER_MEMORY,
    LAYERS,
    arguments,
    gpu_status,
    obey_until_kept,
    on_gpu,
)
from tierd import budget_commands
from tierd.io.memory_limits import Limit
from tierd.io.pages import PageKind, Pages

if TYPE_CHECKING:
    from pathlib import Path

    from tests.daemon.conftest import OpenedOnGpu, PackOnDisk
    from tests.daemon.gpu_daemon import Connect, Start

BUDGET = LAYERS * LAYER_MEMORY


@pytest.fixture
def pack(models: Path) -> PackOnDisk:
    return write_pack(models / "m", LAYERS, LAYER_BYTES)


@pytest.fixture
def daemon(start_daemon: Start, models: Path, pack: PackOnDisk) -> RunningDaemon:
    """A GPU for all layers, which is open, and DRAM for three."""
    started = start_daemon(*arguments(models, f"0={BUDGET}"))
    wait_until(lambda: gpu_status(started)["state"] == "ready", "the GPU is open")
    return started


def touch_all(opened: OpenedOnGpu, pack: PackOnDisk) -> None:
    """Have every layer, one after the other, and keep its chunks mapped."""
    for layer in range(LAYERS):
        lease = opened.acquire(layer)
        assert opened.bytes_of(lease) == pack.content[layer]
        opened.release(lease)


def test_memory_goes_back_to_the_driver_when_clients_have_unmapped_it(
    daemon: RunningDaemon, connect: Connect, pack: PackOnDisk
) -> None:
    opened = on_gpu(connect, daemon)
    touch_all(opened, pack)
    assert gpu_status(daemon)["backed_bytes"] == BUDGET
    attention = opened.table.attention
    lowered = 2 * LAYER_MEMORY
    reply = daemon.ask("budget", tier="gpu:0", bytes=lowered)
    assert reply["budget_bytes"] == lowered
    wait_until(lambda: opened.table.attention != attention, "clients are asked")
    status = gpu_status(daemon)
    assert status["budget_bytes"] == lowered
    assert status["above_budget_bytes"] > 0
    assert status["backed_bytes"] == BUDGET, "nobody unmapped anything yet"
    given_back = wait_until(opened.obey, "there is something to unmap")
    while more := opened.obey():
        given_back += more
    wait_until(lambda: gpu_status(daemon)["above_budget_bytes"] == 0, "the budget is kept")
    assert gpu_status(daemon)["backed_bytes"] <= lowered
    assert set(given_back).isdisjoint(opened.chunks)
    assert opened.attend()["unmap"] == []
    for layer in (5, 0, 3):  # and it works on
        lease = opened.acquire(layer)
        assert opened.bytes_of(lease) == pack.content[layer]
        opened.release(lease)
        opened.obey()
    assert gpu_status(daemon)["backed_bytes"] <= lowered


def test_what_is_leased_is_neither_asked_back_nor_changed(
    daemon: RunningDaemon, connect: Connect, pack: PackOnDisk
) -> None:
    opened = on_gpu(connect, daemon)
    touch_all(opened, pack)
    held = {layer: opened.acquire(layer) for layer in (1, 4)}
    daemon.ask("budget", tier="gpu:0", bytes=3 * LAYER_MEMORY)
    wait_until(opened.obey, "there is something to unmap")
    for layer, lease in held.items():
        assert set(opened.chunks_of(lease)) <= opened.chunks.keys()
        assert opened.bytes_of(lease) == pack.content[layer]
    opened.release(*held.values())
    while opened.obey():
        pass
    wait_until(lambda: gpu_status(daemon)["above_budget_bytes"] == 0, "the budget is kept")


def test_a_client_that_has_the_chunks_and_dies_holds_nothing_up(
    daemon: RunningDaemon, connect: Connect, pack: PackOnDisk
) -> None:
    opened, other = on_gpu(connect, daemon), on_gpu(connect, daemon)
    touch_all(opened, pack)
    touch_all(other, pack)
    daemon.ask("budget", tier="gpu:0", bytes=3 * LAYER_MEMORY)
    wait_until(opened.obey, "there is something to unmap")
    assert gpu_status(daemon)["above_budget_bytes"] > 0
    other.client.close()

    obey_until_kept(opened, daemon, "the budget is kept", 2.0)


#: `python -m tierd` that does not wait for 5 s before it names who does not answer.
SOON_NAMED = """
import sys
from tierd import gpu_memory
from tierd.__main__ import main
gpu_memory.LATE_NS //= 10
sys.exit(main())
"""


def test_a_client_that_does_not_attend_is_named(
    start_daemon: Start, connect: Connect, models: Path, pack: PackOnDisk
) -> None:
    daemon = start_daemon(*arguments(models, f"0={BUDGET}"), program=("-c", SOON_NAMED))
    wait_until(lambda: gpu_status(daemon)["state"] == "ready", "it is open")
    opened = on_gpu(connect, daemon)
    touch_all(opened, pack)
    daemon.ask("budget", tier="gpu:0", bytes=2 * LAYER_MEMORY)

    def named() -> list[str]:
        return [note for note in daemon.status()["notes"] if "does not answer" in note]

    assert named() == []
    (note,) = wait_until(named, "it is named")
    assert f"pid {os.getpid()}" in note
    assert "gpu:0" in note
    while opened.obey():
        pass
    assert named() == []


def test_a_budget_below_what_was_promised_is_refused_with_the_least_that_is_possible(
    daemon: RunningDaemon, connect: Connect
) -> None:
    opened = on_gpu(connect, daemon)
    opened.plan(list(range(LAYERS)))
    client = connect(daemon)
    refusal = client.refusal("budget", tier="gpu:0", bytes=LAYER_MEMORY)
    assert refusal.code == "budget_too_small"
    assert str(LAYER_MEMORY) in refusal.text
    assert gpu_status(daemon)["budget_bytes"] == BUDGET


def test_the_budget_of_dram_changes_too(
    daemon: RunningDaemon, connect: Connect, pack: PackOnDisk
) -> None:
    opened = connect(daemon).open("m")
    lowered = 2 * LAYER_BYTES
    assert daemon.ask("budget", tier="dram", bytes=lowered)["budget_bytes"] <= lowered
    for layer in range(LAYERS):
        lease = opened.acquire(layer)
        assert opened.bytes_of(lease) == pack.content[layer]
        opened.release(lease)
    status = daemon.status()["dram"]
    assert status["used_bytes"] <= status["budget_bytes"] <= lowered
    raised = daemon.ask("budget", tier="dram", bytes=16 * MIB)
    assert raised["budget_bytes"] == 16 * MIB


def test_the_settings_in_effect_say_what_was_commanded(daemon: RunningDaemon) -> None:
    daemon.ask("budget", tier="gpu:0", bytes=2 * LAYER_MEMORY)
    rows = {row["key"]: row for row in daemon.ask("config")["config"]}
    assert rows["gpus"]["value"] == [f"0={2 * LAYER_MEMORY}"]
    assert rows["gpus"]["source"] == "tierctl budget"
    assert rows["dram"]["source"] == "flag --dram"


def test_the_budget_of_a_daemon_without_gpus_changes(
    start_daemon: Start, models: Path, pack: PackOnDisk
) -> None:
    daemon = start_daemon("--models", models, "--dram", str(12 * MIB))
    assert daemon.ask("models")["models"][0]["state"] == "served"
    assert daemon.ask("budget", tier="dram", bytes=8 * MIB)["budget_bytes"] == 8 * MIB
    assert daemon.status()["dram"]["budget_bytes"] == 8 * MIB


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"tier": "gpu:7", "bytes": BUDGET}, "tier_unavailable", "there are dram, gpu:0"),
        ({"tier": "ssd", "bytes": BUDGET}, "tier_unavailable", "there is no tier ssd here"),
        ({"tier": 0, "bytes": BUDGET}, "bad_request", "tier is 0, expected a text"),
        ({"tier": "gpu:0", "bytes": 0}, "bad_request", "expected a number from 1"),
        ({"tier": "gpu:0", "bytes": "1GiB"}, "bad_request", "expected a number from 1"),
        ({"tier": "gpu:0", "bytes": CHUNK - 1}, "bad_request", f"the least of gpu:0, {CHUNK}"),
        ({"tier": "gpu:0", "bytes": 1 << 50}, "bad_request", "above what it can have"),
        ({"tier": "dram", "bytes": 1 << 50}, "bad_request", "above what is available"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(
    daemon: RunningDaemon, connect: Connect, fields: dict[str, Any], code: str, text: str
) -> None:
    refusal = connect(daemon, greet=False).refusal("budget", **fields)
    assert refusal.code == code
    assert text in refusal.text


class Asked:
    """A session of root, and what it was answered."""

    def __init__(self) -> None:
        self.connection = SimpleNamespace(peer=SimpleNamespace(uid=0, pid=1))
        self.refused: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def refuse(self, request: int, code: str, text: str) -> None:
        self.refused.set_result(text)


async def test_more_dram_is_held_against_the_kind_of_page_that_arenas_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of reserved pages there are no more than were reserved, whatever the machine has left."""
    pages, asked = Pages(PageKind.HUGETLB, ""), Asked()

    def available(kind: Pages) -> Limit:
        assert kind is pages
        return Limit(6 * MIB, "reserved pages")

    monkeypatch.setattr(budget_commands, "available_for", available)
    engine: Any = SimpleNamespace(
        config=SimpleNamespace(granule_bytes=2 * MIB), machine=SimpleNamespace(budget_bytes=4 * MIB)
    )
    arenas: Any = SimpleNamespace(pages=pages, populated_bytes=4 * MIB)
    tiers: Any = SimpleNamespace(find=lambda name: None)
    session: Any = asked
    message = {"op": "budget", "tier": "dram", "bytes": 12 * MIB}
    budget_commands.BudgetCommands(engine, arenas, tiers, lambda: None).command(session, 1, message)
    assert "6.0 MiB (6291456 bytes) (reserved pages)" in await asked.refused


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_only_root_and_the_daemon_s_own_user_may(models: Path, tmp_path: Path) -> None:
    write_pack(models / "m", LAYERS, LAYER_BYTES)
    calls: as_nobody.Calls = [("budget", {"tier": "dram", "bytes": 1 << 23})]
    answers = as_nobody.answers_of_a_daemon(models, tmp_path / "log", "12MiB", calls)
    assert answers == ["access_denied"]
