"""`why` and `trace`: true, paged, and only for those who may read the models."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]
import pytest

from tests.daemon import as_nobody
from tests.daemon.conftest import RawClient, Refused, RunningDaemon, write_pack
from tierd.core.model import Acquire, ArenaAdded, Grant, ModelAdded, ReadDone
from tierd.core.transcript import restored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Connect = Callable[..., RawClient]

LAYER_BYTES = 256 << 10


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    place = tmp_path_factory.mktemp("diagnosis")
    write_pack(place / "models" / "open", 4, LAYER_BYTES)
    secret = write_pack(place / "models" / "secret", 4, LAYER_BYTES)
    secret.path.joinpath("tierd.json").chmod(0o600)
    arguments = ["--models", str(place / "models"), "--dram", str(16 << 20)]
    arguments += ["--socket-mode", "0666"]
    # pytest's directory is for its owner only; the socket must be reachable.
    path = f"/tmp/tierd-diagnosis-{os.getpid()}.sock"
    running = RunningDaemon(path, place / "log", arguments).wait_ready()
    yield running
    assert running.stop() == 0


def pages(daemon: RunningDaemon, part: str) -> list[Any]:
    items: list[Any] = []
    first = 0
    while (reply := daemon.ask("trace", part=part, first=first))["items"]:
        items += [msgpack.unpackb(item) for item in reply["items"]]
        first = reply["next"]
    return items


def test_why_knows_who_has_a_layer_and_what_was_decided(
    daemon: RunningDaemon, connect: Connect
) -> None:
    before = daemon.ask("why", model="open", layer="model.layers.1")
    assert (before["layer"], before["bytes"], before["state"]) == (1, LAYER_BYTES, "absent")
    assert (before["history"], before["next_use"]) == ([], None)
    client = connect(daemon)
    opened = client.open("open")
    lease = opened.acquire(1)
    after = daemon.ask("why", model="open", layer=1)
    assert (after["name"], after["state"]) == ("model.layers.1", "resident")
    assert [holder["name"] for holder in after["leased_by"]] == ["test"]
    assert [told["what"] for told in after["history"]] == ["wait", "read", "resident", "grant"]
    assert all(told["ago_ns"] >= 0 for told in after["history"])
    client.call("release", leases=[lease["lease"]])
    assert daemon.ask("why", model="open", layer=1)["leased_by"] == []


def test_why_says_how_a_layer_came_to_a_gpu(
    tmp_path: Path, start_daemon: Callable[..., RunningDaemon], connect: Connect
) -> None:
    write_pack(tmp_path / "m", 4, LAYER_BYTES)
    daemon = start_daemon(
        *("--pack", tmp_path / "m", "--dram", "16MiB", "--gpu", "0=16MiB"),
        *("--gpu-device", "memfd", "--gpu-chunk", "2MiB"),
    )
    connect(daemon, tier="gpu:0").open("m").acquire(2)
    history = daemon.ask("why", model="m", layer=2, tier="gpu:0")["history"]
    assert [told["what"] for told in history] == ["wait", "read", "copy", "resident", "grant"]
    [copied] = [told["text"] for told in history if told["what"] == "copy"]
    assert re.fullmatch(r"from slot \d+ of DRAM(, while that is read)?", copied)
    first, times = 0, []
    while (reply := daemon.ask("trace", part="entries", first=first, tier="gpu:0"))["items"]:
        times += [msgpack.unpackb(item)[1] for item in reply["items"]]
        first = reply["next"]
    assert times == sorted(times)


def test_why_names_what_is_not_there(daemon: RunningDaemon) -> None:
    for fields, code in (
        ({"model": "nothing", "layer": 0}, "not_found"),
        ({"model": "open", "layer": 4}, "not_found"),
        ({"model": "open", "layer": "model.layers.9"}, "not_found"),
        ({"model": "open", "layer": None}, "bad_request"),
        ({"model": 5, "layer": 0}, "bad_request"),
    ):
        with pytest.raises(Refused) as caught:
            daemon.ask("why", **fields)
        assert caught.value.code == code
    with pytest.raises(Refused, match=r"4, from 'model.layers.0' to 'model.layers.3'"):
        daemon.ask("why", model="open", layer=9)


def test_the_trace_holds_every_event_in_order_and_what_it_led_to(
    daemon: RunningDaemon, connect: Connect
) -> None:
    opened = connect(daemon).open("open")
    lease = opened.acquire(2)
    about = daemon.ask("trace", part="opening")
    assert about["config"]["budget_bytes"] == 16 << 20
    entries = pages(daemon, "entries")
    assert [entry[0] for entry in entries] == list(range(len(entries)))
    assert [entry[1] for entry in entries] == sorted(entry[1] for entry in entries)
    events = [restored(entry[2], about["schema"]) for entry in entries]
    actions = [restored(action, about["schema"]) for entry in entries for action in entry[3]]
    assert {type(event) for event in events} >= {ArenaAdded, ModelAdded, Acquire, ReadDone}
    granted = [action for action in actions if isinstance(action, Grant)]
    assert granted[-1].lease == lease["lease"]
    assert ["grant", [opened.model_id, 2]] in [told[:2] for entry in entries for told in entry[4]]
    assert dict((name, layers) for _, name, layers in pages(daemon, "models"))["secret"] == [
        f"model.layers.{number}" for number in range(4)
    ]


def test_a_trace_goes_on_where_the_last_page_ended(daemon: RunningDaemon, connect: Connect) -> None:
    end = daemon.ask("trace", part="entries", first=1 << 40)
    assert end["items"] == []
    opened = connect(daemon).open("open")
    opened.acquire(3)
    more = daemon.ask("trace", part="entries", first=end["end"])["items"]
    assert {msgpack.unpackb(item)[2][0] for item in more} >= {"@ClientJoined", "@Acquire"}


def test_a_trace_is_asked_for_properly_or_not_at_all(daemon: RunningDaemon) -> None:
    for fields in (
        {"part": "everything"},
        {"part": "entries", "first": -1},
        {"first": "0"},
        {"first": 1 << 63},
    ):
        with pytest.raises(Refused) as caught:
            daemon.ask("trace", **fields)
        assert caught.value.code == "bad_request"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_who_may_not_read_a_model_does_not_learn_its_story(
    daemon: RunningDaemon, connect: Connect
) -> None:
    connect(daemon).open("secret").acquire(0)
    calls: as_nobody.Calls = [
        ("why", {"model": "open", "layer": 0}),
        ("why", {"model": "secret", "layer": 0}),
        *(("trace", {"part": part}) for part in ("opening", "models", "entries")),
    ]
    assert as_nobody.answers(daemon.socket, calls) == ["ok", *["access_denied"] * 4]
    assert daemon.ask("why", model="secret", layer=0)["state"] == "resident"
