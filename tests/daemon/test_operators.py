"""pin, unpin and evict by name and pattern, over reloads, and for whom."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon import as_nobody
from tests.daemon.conftest import RawClient, Refused, RunningDaemon, wait_until, write_pack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Start = Callable[..., RunningDaemon]
    Connect = Callable[..., RawClient]

LAYERS, LAYER_BYTES = 6, 2 << 20


@pytest.fixture
def daemon(start_daemon: Start, models: Path) -> RunningDaemon:
    write_pack(models / "m", LAYERS, LAYER_BYTES)
    return start_daemon("--models", models, "--dram", str(4 * LAYER_BYTES))


def layers_of(daemon: RunningDaemon) -> list[tuple[str, str, bool]]:
    listed = daemon.ask("layers", model="m")["layers"]
    return [(layer["name"], layer["state"], layer["pinned"]) for layer in listed]


def test_pinned_layers_are_read_and_shown(daemon: RunningDaemon) -> None:
    names = [name for name, _, _ in layers_of(daemon)]
    reply = daemon.ask("pin", model="m", layers=[names[2], names[5]])
    assert (reply["layers"], reply["bytes"]) == ([names[2], names[5]], 2 * LAYER_BYTES)
    wanted = [(names[2], "resident", True), (names[5], "resident", True)]
    wait_until(lambda: [x for x in layers_of(daemon) if x[2]] == wanted, "they are resident")
    assert daemon.status()["dram"]["pinned_bytes"] == 2 * LAYER_BYTES
    assert daemon.ask("unpin", model="m")["layers"] == [names[2], names[5]]
    assert daemon.status()["dram"]["pinned_bytes"] == 0


def test_a_pin_that_breaks_the_budget_is_refused_with_both_numbers(daemon: RunningDaemon) -> None:
    with pytest.raises(Refused) as refusal:
        daemon.ask("pin", model="m", layers=["*"])
    assert refusal.value.code == "budget_too_small"
    assert str(LAYERS * LAYER_BYTES) in refusal.value.text
    assert str(4 * LAYER_BYTES) in refusal.value.text
    assert not any(pinned for _, _, pinned in layers_of(daemon))


def test_evict_spares_what_is_leased_and_says_so(daemon: RunningDaemon, connect: Connect) -> None:
    opened = connect(daemon).open("m")
    held = opened.acquire(0)
    opened.client.call("release", leases=[opened.acquire(1)["lease"]])
    names = [name for name, _, _ in layers_of(daemon)]
    reply = daemon.ask("evict", model="m")
    assert reply["layers"] == [names[1]]
    assert reply["kept"] == [{"layer": names[0], "text": "a lease is on it"}]
    opened.client.call("release", leases=[held["lease"]])
    assert daemon.ask("evict", model="m", layers=[names[0]])["layers"] == [names[0]]


def test_pins_come_back_when_their_pack_is_replaced_or_returns(
    daemon: RunningDaemon, models: Path
) -> None:
    name = layers_of(daemon)[3][0]
    daemon.ask("pin", model="m", layers=[name])
    (models / "m").rename(models.parent / "aside")
    assert daemon.ask("reload")["removed"] == ["m"]
    assert daemon.status()["dram"]["pinned_bytes"] == 0
    write_pack(models / "m", LAYERS, LAYER_BYTES)
    assert daemon.ask("reload")["added"] == ["m"]
    wait_until(lambda: layers_of(daemon)[3] == (name, "resident", True), "it is pinned again")
    write_pack(models.parent / "new", LAYERS, LAYER_BYTES)
    (models / "m").rename(models.parent / "old")
    (models.parent / "new").rename(models / "m")
    assert daemon.ask("reload")["replaced"] == ["m"]
    wait_until(lambda: layers_of(daemon)[3] == (name, "resident", True), "it is pinned once more")
    assert daemon.status()["dram"]["pinned_bytes"] == LAYER_BYTES


def test_a_model_that_is_away_can_be_unpinned(daemon: RunningDaemon, models: Path) -> None:
    names = [name for name, _, _ in layers_of(daemon)]
    daemon.ask("pin", model="m", layers=[names[1], names[3]])
    (models / "m").rename(models.parent / "aside")
    assert daemon.ask("reload")["removed"] == ["m"]
    reply = daemon.ask("unpin", model="m", layers=[*names[2:]])
    assert (reply["layers"], reply["bytes"]) == ([names[3]], LAYER_BYTES)
    (models.parent / "aside").rename(models / "m")
    assert daemon.ask("reload")["added"] == ["m"]
    assert [name for name, _, pinned in layers_of(daemon) if pinned] == [names[1]]
    (models / "m").rename(models.parent / "aside")
    daemon.ask("reload")
    assert daemon.ask("unpin", model="m")["layers"] == [names[1]]
    with pytest.raises(Refused, match="not_found"):
        daemon.ask("unpin", model="m")


def test_a_command_that_means_nothing_is_refused(daemon: RunningDaemon) -> None:
    wrong: list[tuple[dict[str, object], str]] = [
        ({"model": "nobody"}, "not_found"),
        ({"model": "m", "layers": ["no such layer"]}, "not_found"),
        ({"model": "m", "layers": "all"}, "bad_request"),
        ({"model": 3}, "bad_request"),
    ]
    for op in ("pin", "unpin", "evict"):
        for fields, code in wrong:
            with pytest.raises(Refused) as refusal:
                daemon.ask(op, **fields)
            assert refusal.value.code == code, (op, fields)


def test_a_command_is_one_line_of_the_log_whatever_is_in_it(daemon: RunningDaemon) -> None:
    with pytest.raises(Refused):
        daemon.ask("pin", model="m", layers=["x\n\x1b[31mERROR forged", "y" * 4_000])
    lines = [line for line in daemon.log_text().splitlines() if "forged" in line]
    assert len(lines) == 1
    assert ": pin m ['x\\n\\x1b[31mERROR forged'" in lines[0]
    assert len(lines[0]) < 1_000


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_only_root_and_the_daemon_s_own_user_may(models: Path, tmp_path: Path) -> None:
    write_pack(models / "m", LAYERS, LAYER_BYTES)
    calls: list[tuple[str, dict[str, Any]]] = [
        (op, {"model": "m"}) for op in ("pin", "unpin", "evict", "layers")
    ]
    assert as_nobody.answers_of_a_daemon(models, tmp_path / "log", "8MiB", calls) == [
        *["access_denied"] * 3,
        "ok",
    ]
