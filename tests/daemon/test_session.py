"""One client's requests: the handshake, every op, every refusal."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.daemon.conftest import (
    PackOnDisk,
    RawClient,
    Refused,
    RunningDaemon,
    wait_until,
    write_pack,
)
from tierd.session import Session
from tierd_layouts import wire
from tierd_layouts.index import PackIndex
from tierd_layouts.slot_entries import SlotState
from tierd_layouts.wire import encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Connect = Callable[..., RawClient]

LAYERS, LAYER_BYTES = 6, 256 << 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("session")


@pytest.fixture(scope="module")
def pack(place: Path) -> PackOnDisk:
    return write_pack(place / "models" / "tiny", LAYERS, LAYER_BYTES)


@pytest.fixture(scope="module")
def daemon(place: Path, pack: PackOnDisk) -> Iterator[RunningDaemon]:
    """A budget of four layers out of six."""
    arguments = ["--models", str(place / "models"), "--dram", str(4 * LAYER_BYTES)]
    daemon = RunningDaemon(str(place / "tierd.sock"), place / "log", arguments).wait_ready()
    yield daemon
    assert daemon.stop() == 0
    assert "fault" not in daemon.log_text()


def test_hello_says_who_answers(daemon: RunningDaemon, connect: Connect) -> None:
    reply = connect(daemon, greet=False).hello()
    assert reply["version"] == 1
    assert reply["pid"] == daemon.pid
    assert reply["epoch"] == daemon.status()["daemon"]["epoch"] > 0


def test_another_version_is_refused_with_both_numbers(
    daemon: RunningDaemon, connect: Connect
) -> None:
    client = connect(daemon, greet=False)
    refusal = client.refusal("hello", version=99, client="x", capabilities=[], held=[])
    assert refusal.code == "version_mismatch"
    assert "99" in refusal.text
    assert "1" in refusal.text


def test_what_needs_a_hello_says_so(daemon: RunningDaemon, connect: Connect) -> None:
    client = connect(daemon, greet=False)
    for op in ("open", "acquire", "plan", "release", "close"):
        assert client.refusal(op, model="tiny", leases=[]).code == "bad_request"
    client.hello()
    assert client.refusal("hello", version=1, client="x", held=[]).code == "bad_request"


def test_an_unknown_op_is_named(daemon: RunningDaemon, connect: Connect) -> None:
    refusal = connect(daemon).refusal("frobnicate")
    assert refusal.code == "unknown_op"
    assert "frobnicate" in refusal.text


def test_open_brings_index_control_files_arena_and_table(
    daemon: RunningDaemon, connect: Connect, pack: PackOnDisk
) -> None:
    opened = connect(daemon).open("tiny")
    assert set(opened.files) == {"tierd.json", "config.json"}
    assert PackIndex.parse(opened.files["tierd.json"], where="reply") == pack.index
    assert json.loads(opened.files["config.json"])["model_type"] == "tiny"
    assert opened.table.epoch == daemon.status()["daemon"]["epoch"]


def test_the_descriptors_of_an_open_cannot_be_written(
    daemon: RunningDaemon, connect: Connect
) -> None:
    client = connect(daemon)
    client.call("open", model="tiny")
    fds, client._fds = client._fds, []
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        os.close(fd)


@pytest.mark.parametrize("name", ["nowhere", "", "../tiny", "tiny/..", "/etc", "ti\0ny"])
def test_a_model_that_is_not_served_is_not_found(
    daemon: RunningDaemon, connect: Connect, name: str
) -> None:
    refusal = connect(daemon).refusal("open", model=name)
    assert refusal.code == "not_found"


def test_every_layer_is_granted_with_its_bytes_and_its_table_entry(
    daemon: RunningDaemon, connect: Connect, pack: PackOnDisk
) -> None:
    opened = connect(daemon).open("tiny")
    for layer in range(LAYERS):
        lease = opened.acquire(layer)
        assert lease["bytes"] == LAYER_BYTES
        assert opened.bytes_of(lease) == pack.content[layer]
        entry = opened.table.slot(lease["slot"])
        assert entry is not None
        assert (entry.generation, entry.offset) == (lease["generation"], lease["offset"])
        assert entry.state is SlotState.RESIDENT
        held = {held.lease: held for held in opened.table.leases()}[lease["lease"]]
        assert held.pid == os.getpid()
        opened.client.call("release", leases=[lease["lease"]])
        assert lease["lease"] not in {held.lease for held in opened.table.leases()}


def test_pipelined_requests_are_all_answered_by_id(
    daemon: RunningDaemon, connect: Connect, pack: PackOnDisk
) -> None:
    opened = connect(daemon).open("tiny")
    client = opened.client
    for _ in range(5):
        requests = {
            client.send("acquire", model_id=opened.model_id, layer=layer): layer
            for layer in (0, 1, 0)
        }
        leases = []
        for request, layer in reversed(requests.items()):
            lease = client.receive(request)
            assert opened.bytes_of(lease) == pack.content[layer]
            leases.append(lease["lease"])
        client.call("release", leases=leases)


def test_a_release_with_id_zero_gets_no_reply(daemon: RunningDaemon, connect: Connect) -> None:
    opened = connect(daemon).open("tiny")
    client = opened.client
    lease = opened.acquire(0)
    client.sock.sendall(encode({"id": 0, "op": "release", "leases": [lease["lease"]]}))
    client.sock.sendall(encode({"id": 0, "op": "release", "leases": [12345]}))
    assert client.call("clients")["clients"][0]["leases"] == 0
    assert client._replies == {}


def test_a_lease_of_another_client_cannot_be_released(
    daemon: RunningDaemon, connect: Connect
) -> None:
    first, second = connect(daemon).open("tiny"), connect(daemon).open("tiny")
    lease = first.acquire(0)
    refusal = second.client.refusal("release", leases=[lease["lease"]])
    assert refusal.code == "bad_request"
    assert str(lease["lease"]) in refusal.text
    assert lease["lease"] in {held.lease for held in first.table.leases()}


def test_a_plan_says_what_it_reserves_and_the_next_layers_are_read_ahead(
    daemon: RunningDaemon, connect: Connect
) -> None:
    opened = connect(daemon).open("tiny")
    client = opened.client
    reply = client.call(
        "plan", model_id=opened.model_id, order=list(range(LAYERS)), kind="cyclic", lookahead=1
    )
    assert reply["minimum_bytes"] == LAYER_BYTES
    lease = opened.acquire(2)

    def next_is_resident() -> bool:
        layers = client.call("layers", model="tiny")["layers"]
        return bool(layers[3]["state"] == "resident")

    wait_until(next_is_resident, "layer 3 is read before anybody asks")
    client.call("release", leases=[lease["lease"]])


def test_a_second_plan_that_does_not_fit_is_refused_with_the_numbers(
    start_daemon: Callable[..., RunningDaemon], connect: Connect, models: Path
) -> None:
    write_pack(models / "big", 2, 1 << 20)
    daemon = start_daemon("--models", models, "--dram", str(3 << 19))
    first, second = connect(daemon).open("big"), connect(daemon).open("big")
    plan = {"order": [0, 1], "kind": "cyclic", "lookahead": 1}
    first.client.call("plan", model_id=first.model_id, **plan)
    refusal = second.client.refusal("plan", model_id=second.model_id, **plan)
    assert refusal.code == "budget_too_small"
    assert str(1 << 20) in refusal.text
    assert str(3 << 19) in refusal.text


def test_more_than_the_budget_ahead_is_answered_later_and_refused_when_demanded(
    daemon: RunningDaemon, connect: Connect
) -> None:
    opened = connect(daemon).open("tiny")
    leases = [opened.acquire(layer)["lease"] for layer in range(4)]
    assert opened.acquire(4, ahead=True)["later"] is True
    with pytest.raises(Refused) as caught:
        opened.acquire(4)
    assert caught.value.code == "lease_limit"
    opened.client.call("release", leases=leases[:1])
    assert opened.acquire(4, ahead=True)["offset"] >= 0


@pytest.mark.parametrize(
    ("op", "fields", "code"),
    [
        ("acquire", {"layer": LAYERS}, "not_found"),
        ("acquire", {"layer": -1}, "not_found"),
        ("acquire", {"layer": True}, "bad_request"),
        ("acquire", {"layer": "0"}, "bad_request"),
        ("acquire", {"layer": 0, "ahead": 1}, "bad_request"),
        ("plan", {"order": []}, "bad_request"),
        ("plan", {"order": [0] * (16 * LAYERS + 1)}, "bad_request"),
        ("plan", {"order": [0, LAYERS]}, "bad_request"),
        ("plan", {"order": [0], "lookahead": -1}, "bad_request"),
        ("plan", {"order": [0], "kind": "yes"}, "bad_request"),
        ("plan", {"order": "all"}, "bad_request"),
        ("release", {"leases": ["1"]}, "bad_request"),
        ("layers", {"model": "nowhere"}, "not_found"),
    ],
)
def test_a_wrong_field_is_refused(
    daemon: RunningDaemon, connect: Connect, op: str, fields: dict[str, object], code: str
) -> None:
    opened = connect(daemon).open("tiny")
    refusal = opened.client.refusal(op, **{"model_id": opened.model_id, **fields})
    assert refusal.code == code


def test_a_model_that_this_connection_did_not_open_is_not_admitted(
    daemon: RunningDaemon, connect: Connect
) -> None:
    first = connect(daemon).open("tiny")
    second = connect(daemon)
    assert second.refusal("acquire", model_id=first.model_id, layer=0).code == "not_admitted"
    first.client.call("close", model_id=first.model_id)
    assert first.client.refusal("acquire", model_id=first.model_id, layer=0).code == "not_admitted"


def test_a_client_may_hold_at_most_1024_leases(
    start_daemon: Callable[..., RunningDaemon], connect: Connect, models: Path
) -> None:
    write_pack(models / "small", 1, 4096)
    opened = connect(start_daemon("--models", models, "--dram", "4MiB")).open("small")
    for _ in range(1024):
        opened.acquire(0)
    with pytest.raises(Refused) as caught:
        opened.acquire(0)
    assert caught.value.code == "lease_limit"
    assert "1024" in caught.value.text


def test_a_request_id_that_waits_cannot_be_used_again(
    start_daemon: Callable[..., RunningDaemon], connect: Connect, models: Path
) -> None:
    write_pack(models / "slow", 2, 8 << 20)
    daemon = start_daemon("--models", models, "--dram", "32MiB", "--ssd-bandwidth", "4MiB")
    opened = connect(daemon).open("slow")
    request = {"id": 77, "op": "acquire", "model_id": opened.model_id, "layer": 0}
    opened.client.sock.sendall(encode(request) + encode(request))
    with pytest.raises(Refused) as caught:
        opened.client.receive(77)
    assert caught.value.code == "bad_request"
    assert opened.client.receive(77)["bytes"] == 8 << 20


def test_many_clients_that_hold_nothing_take_no_room_in_the_slot_table(
    start_daemon: Callable[..., RunningDaemon], connect: Connect, models: Path
) -> None:
    """What each of 300 clients could ask for at once is more than the table has entries."""
    write_pack(models / "tiny", 2, LAYER_BYTES)
    daemon = start_daemon("--models", models, "--dram", "4MiB", "--max-clients", "400")
    for _ in range(300):
        connect(daemon)
    opened = connect(daemon).open("tiny")
    lease = opened.acquire(1)["lease"]
    opened.client.call("release", leases=[lease])


def test_an_answer_that_no_frame_can_hold_becomes_an_error() -> None:
    sent: list[dict[str, Any]] = []

    def send(message: dict[str, Any], fds: object = ()) -> None:
        wire.encode(message)
        sent.append(message)

    connection = SimpleNamespace(send=send, peer=SimpleNamespace(pid=1))
    session = Session(cast("Any", None), cast("Any", connection), client=1)
    session.reply(7, {"layers": ["x" * 1024] * 5000})
    (reply,) = sent
    assert reply["id"] == 7
    assert reply["error"]["code"] == "internal"
    assert str(wire.MAX_REPLY_BYTES) in reply["error"]["text"]


def test_a_closed_model_leaves_no_plan_and_no_reserve(
    daemon: RunningDaemon, connect: Connect
) -> None:
    opened = connect(daemon).open("tiny")
    opened.plan(list(range(LAYERS)))
    (client,) = daemon.ask("clients")["clients"]
    assert client["plan"] == "cyclic"
    opened.client.call("close", model_id=opened.model_id)
    (client,) = daemon.ask("clients")["clients"]
    assert (client["plan"], client["reserved_bytes"]) == (None, 0)
