from __future__ import annotations

import dataclasses
import gc
import math
import os
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.client.conftest import FakeDaemon
from tierd_client import Client
from tierd_client.device import GpuDevice
from tierd_client.errors import (
    AccessDenied,
    BudgetTooSmall,
    ClientClosed,
    DaemonGone,
    LayerNotFound,
    ModelNotFound,
    PackInvalid,
    ProtocolBroken,
    Refused,
    TierUnavailable,
    TooManyClients,
    UnsupportedDevice,
    VersionMismatch,
)
from tierd_layouts.wire import encode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.client.conftest import TinyPack


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.path, timeout=20) as client:
        yield client


def open_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


# --------------------------------------------------------------------------------------- handshake


def test_the_handshake_tells_both_sides_who_they_talk_to(daemon: FakeDaemon) -> None:
    with Client(daemon.path, name="trainer") as client:
        (hello,) = daemon.asked("hello")
        assert (hello["version"], hello["client"], hello["held"]) == (1, "trainer", [])
        assert (client.daemon_pid, client.daemon_version) == (os.getpid(), "fake")
        assert (client.epoch, client.capabilities) == (daemon.epoch, ("x",))


def test_a_client_without_a_name_says_which_process_it_is(daemon: FakeDaemon) -> None:
    Client(daemon.path).close()
    assert daemon.asked("hello")[0]["client"].endswith(f"[{os.getpid()}]")


def test_a_socket_without_a_name_and_a_timeout_of_nothing_or_for_ever_are_refused(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Client(os.environ.get("MINE", ""))` must not end at another daemon."""
    monkeypatch.setenv("TIERD_SOCKET", daemon.path)
    with pytest.raises(ValueError, match="socket '' is no path"):
        Client("")
    for timeout in (0, math.inf, math.nan, 1e300):
        with pytest.raises(
            ValueError, match=r"timeout is .* s, expected more than 0 and at most 1"
        ):
            Client(timeout=timeout)


def test_a_layer_is_leased_by_name_or_by_number(client: Client) -> None:
    for layer in ("blocks.1", 2):
        with client.lease("tiny", layer) as lease:
            assert lease.layer.name == "blocks.1"
    with pytest.raises(LayerNotFound, match="has no layer number 99; it has 0 to "):
        client.lease("tiny", 99)


def test_the_socket_comes_from_the_environment_when_nobody_names_it(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERD_SOCKET", daemon.path)
    with Client() as client:
        assert client.socket == daemon.path


def test_another_protocol_version_is_refused_with_both_numbers(daemon: FakeDaemon) -> None:
    daemon.version = 2
    with pytest.raises(VersionMismatch, match="version 2, this client 1"):
        Client(daemon.path)


def test_a_handshake_that_the_daemon_refuses_leaves_no_descriptor(daemon: FakeDaemon) -> None:
    daemon.refusals["hello"] = ("too_many_clients", "64 clients are connected, the limit is 64")
    before = open_descriptors()
    for _ in range(3):
        with pytest.raises(TooManyClients, match="64 clients"):
            Client(daemon.path)
    daemon.wait_until(lambda: open_descriptors() <= before + 3)  # the daemon's ends, in this test


# ------------------------------------------------------------------------------------------ models


def test_opening_gives_the_index_and_the_control_files(client: Client, pack: TinyPack) -> None:
    opened = client.open("tiny")
    assert (opened.name, opened.model_id) == ("tiny", 9)
    assert opened.index == pack.index
    assert sorted(opened.files) == ["config.json", "tierd.json"]
    assert opened.files["config.json"] == b'{"model_type": "tiny"}'
    assert opened.files["config.json"] == b'{"model_type": "tiny"}'
    assert len(opened.files) == 2
    assert "tokenizer.json" not in opened.files
    assert opened.layer_index("blocks.1") == 2


def test_a_model_is_opened_once(daemon: FakeDaemon, client: Client) -> None:
    assert client.open("tiny") is client.open("tiny")
    client.lease("tiny", "embed").release()
    assert len(daemon.asked("open")) == 1


def test_a_closed_model_is_opened_anew(daemon: FakeDaemon, client: Client) -> None:
    opened = client.open("tiny")
    opened.close()
    opened.close()
    assert daemon.asked("close") == [
        {"id": daemon.requests[-1]["id"], "op": "close", "model_id": 9}
    ]
    assert client.open("tiny") is not opened


def test_descriptors_live_no_longer_than_the_client(daemon: FakeDaemon) -> None:
    before = open_descriptors()
    with Client(daemon.path) as client:
        assert client.open("tiny").files["config.json"]
    del client
    daemon.stop()
    daemon.wait_until(lambda: open_descriptors() < before)  # its listener is closed too


@pytest.mark.parametrize(
    ("code", "error"),
    [("not_found", ModelNotFound), ("access_denied", AccessDenied), ("pack_invalid", PackInvalid)],
)
def test_a_model_that_the_daemon_will_not_open_raises_its_error(
    daemon: FakeDaemon, client: Client, code: str, error: type[Exception]
) -> None:
    daemon.refusals["open"] = (code, "model 'm': why")
    with pytest.raises(error, match="model 'm': why"):
        client.open("m")
    daemon.refusals.clear()
    client.open("tiny")


def test_an_open_reply_without_descriptors_ends_the_connection(
    daemon: FakeDaemon, client: Client
) -> None:
    def answer(message: dict[str, Any]) -> list[bytes] | None:
        return [encode({"id": message["id"], "ok": True, "files": ["a"], "model_id": 1})]

    daemon.answers = answer
    with pytest.raises(ProtocolBroken, match="0 descriptors, it needs 3"):
        client.open("tiny")
    with pytest.raises(DaemonGone):
        client.open("tiny")


def test_an_arena_smaller_than_announced_ends_the_connection(
    daemon: FakeDaemon, client: Client
) -> None:
    daemon.span += 4096
    with pytest.raises(ProtocolBroken, match="arena 3 has"):
        client.open("tiny")
    with pytest.raises(ProtocolBroken):
        client.ask("status")


# -------------------------------------------------------------------------------------------- tiers


def test_a_client_of_dram_names_no_tier_so_that_an_older_daemon_understands_it(
    daemon: FakeDaemon, client: Client
) -> None:
    assert "tier" not in daemon.asked("hello")[0]
    assert (client.tier, client.gpu) == ("dram", None)
    client.attend(scratch_bytes=7)
    assert daemon.asked("attend") == []


def test_a_client_of_a_gpu_says_so_and_learns_what_it_is(gpu_daemon: FakeDaemon) -> None:
    gpu_daemon.device = {"kind": "memfd", "number": 2, "uuid": "u"}
    with Client(gpu_daemon.path, tier="gpu:2") as client:
        assert gpu_daemon.asked("hello")[0]["tier"] == "gpu:2"
        assert client.tier == "gpu:2"
        assert client.gpu == GpuDevice("memfd", 2, "u")


def test_a_daemon_that_knows_no_tiers_is_refused_by_name(daemon: FakeDaemon) -> None:
    with pytest.raises(
        TierUnavailable, match=r"tierd fake .* knows no tier 'gpu:0': it serves DRAM"
    ):
        Client(daemon.path, tier="gpu:0")


def test_a_tier_that_the_daemon_has_not_is_its_error(daemon: FakeDaemon) -> None:
    daemon.refusals["hello"] = ("tier_unavailable", "no tier 'gpu:4': there are dram, gpu:0")
    with pytest.raises(TierUnavailable, match="there are dram, gpu:0"):
        Client(daemon.path, tier="gpu:4")


def test_a_tier_that_is_none_is_refused_before_anything_is_connected() -> None:
    with pytest.raises(UnsupportedDevice, match="tier 'vram' is unknown"):
        Client("/nowhere", tier="vram")


def test_an_arena_of_another_tier_ends_the_connection(gpu_daemon: FakeDaemon) -> None:
    client = Client(gpu_daemon.path)  # the daemon answers as to a client of its GPU
    with pytest.raises(ProtocolBroken, match="arena of kind 'memfd' of dram"):
        client.open("tiny")
    assert not client._connection.alive


# ------------------------------------------------------------------------------------------- plans


def test_a_plan_names_layers_and_returns_what_is_reserved(
    daemon: FakeDaemon, client: Client
) -> None:
    opened = client.open("tiny")
    assert opened.plan(["embed", "blocks.0", 2], kind="once", lookahead=2) == 12345
    (plan,) = daemon.asked("plan")
    assert plan["order"] == [0, 1, 2]
    assert (plan["kind"], plan["lookahead"], plan["model_id"]) == ("once", 2, 9)
    with pytest.raises(LayerNotFound, match=r"blocks\.7"):
        opened.plan(["embed", "blocks.7"])


def test_a_hint_names_layers_and_their_probability_and_waits_for_no_reply(
    daemon: FakeDaemon, client: Client
) -> None:
    opened = client.open("tiny")
    opened.plan(kind="open", tokens_per_pass=8)
    opened.hint({"blocks.0": 0.25, 2: 1.0}, steps=3)
    client.ask("status")  # what was sent before has arrived
    (plan,), (hint,) = daemon.asked("plan"), daemon.asked("hint")
    assert (plan["kind"], plan["tokens_per_pass"]) == ("open", 8)
    assert (hint["id"], hint["layers"], hint["ppm"], hint["steps"]) == (
        0,
        [1, 2],
        [250_000, 1_000_000],
        3,
    )
    with pytest.raises(ValueError, match=r"probability 1\.5"):
        opened.hint({0: 1.5})


def test_numbers_of_a_router_are_as_good_as_plain_ones(daemon: FakeDaemon, client: Client) -> None:
    opened = client.open("tiny")
    layers: Any = np.array([2, 1])
    chances: Any = np.array([0.5, 1.0], dtype=np.float32)
    steps: Any = np.int64(2)
    opened.plan(layers, kind="open", lookahead=0)
    opened.hint(dict(zip(layers, chances, strict=True)), steps=steps)
    client.ask("status")
    (plan,), (hint,) = daemon.asked("plan"), daemon.asked("hint")
    assert plan["order"] == hint["layers"] == [2, 1]
    assert (hint["ppm"], hint["steps"]) == ([500_000, 1_000_000], 2)


def test_a_hint_that_a_daemon_would_drop_in_silence_is_refused_here(
    daemon: FakeDaemon, client: Client
) -> None:
    opened = client.open("tiny")
    with pytest.raises(LayerNotFound, match="no layer 99"):
        opened.hint([0, 99])
    with pytest.raises(ValueError, match="1 to 65536 steps, not 65537 steps"):
        opened.hint([0], steps=65537)
    with pytest.raises(ValueError, match="a layer twice"):
        opened.hint(["blocks.0", 1])
    no_number: Any = 1.5
    with pytest.raises(TypeError, match="'float' object"):
        opened.hint([no_number])
    with pytest.raises(TypeError, match="'float' object"):
        opened.hint([1], steps=no_number)
    with pytest.raises(Refused, match="more than 64 bits"):
        opened.plan(lookahead=1 << 70)
    client.ask("status")
    assert daemon.asked("hint") == []


def test_a_plan_that_does_not_fit_says_why(daemon: FakeDaemon, client: Client) -> None:
    daemon.refusals["plan"] = ("budget_too_small", "needs 10, 5 available, budget 20")
    with pytest.raises(BudgetTooSmall, match="needs 10, 5 available") as caught:
        client.open("tiny").plan(["embed"])
    assert isinstance(caught.value, MemoryError)
    assert caught.value.code == "budget_too_small"


# -------------------------------------------------------------------------------------- statistics


def test_statistics_count_leases_bytes_and_waiting_and_do_not_change(
    daemon: FakeDaemon, client: Client, pack: TinyPack
) -> None:
    first = client.statistics()
    nbytes = pack.index.layers[1].nbytes
    daemon.may_grant.clear()
    threading.Timer(0.1, daemon.may_grant.set).start()
    with client.lease("tiny", "blocks.0"):
        inside = client.statistics()
    after = client.statistics()
    assert (first.leases, inside.leases, after.leases) == (0, 1, 1)
    assert (inside.held, inside.held_bytes, inside.leased_bytes) == (1, nbytes, nbytes)
    assert (after.held, after.held_bytes, after.leased_bytes) == (0, 0, nbytes)
    assert inside.wait_ns > 50_000_000
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.leases = 5  # type: ignore[misc]


def test_threads_share_a_client(daemon: FakeDaemon, client: Client) -> None:
    wrong: list[object] = []

    def work() -> None:
        for name in ("embed", "blocks.0", "blocks.1", "odd") * 10:
            with client.lease("tiny", name) as lease:
                if lease.layer.name != name:
                    wrong.append(lease)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    assert client.statistics().leases == 120
    assert len(daemon.asked("open")) == 1
    daemon.wait_until(lambda: not daemon.leases)


# --------------------------------------------------------------------------------------------- end


def test_a_closed_client_refuses_everything(client: Client) -> None:
    opened = client.open("tiny")
    client.close()
    client.close()
    for use in (
        lambda: client.ask("status"),
        lambda: client.open("tiny"),
        lambda: opened.acquire(0),
    ):
        with pytest.raises(ClientClosed):
            use()


def test_diagnostics_that_fail_carry_the_code(daemon: FakeDaemon, client: Client) -> None:
    daemon.refusals["reload"] = ("internal", "a bug")
    with pytest.raises(Refused, match="a bug") as caught:
        client.ask("reload")
    assert caught.value.code == "internal"


def test_a_restarted_daemon_hears_what_is_still_read_and_when_that_ends(
    tmp_path: Path, pack: TinyPack
) -> None:
    old = FakeDaemon(tmp_path / "a.sock", pack)
    first = Client(old.path)
    lease, given_back = first.lease("tiny", "blocks.0"), first.lease("tiny", "blocks.1")
    given_back.release()
    old.close()
    with pytest.raises(DaemonGone):
        first.ask("status")
    os.unlink(old.path)
    new = FakeDaemon(tmp_path / "a.sock", pack)
    other = FakeDaemon(tmp_path / "b.sock", pack)
    Client(other.path).close()
    second = Client(new.path)
    assert new.asked("hello")[0]["held"] == [lease.lease]
    assert other.asked("hello")[0]["held"] == []
    lease.release()
    second.ask("status")
    assert [request["leases"] for request in new.asked("release")] == [[lease.lease]]
    with Client(new.path):
        assert new.asked("hello")[1]["held"] == []
    second.close()
    new.close()
    other.close()
