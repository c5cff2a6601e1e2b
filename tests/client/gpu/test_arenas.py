from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.client.conftest import CHUNK_BYTES, MODEL
from tierd_client import Client
from tierd_client.errors import ClientClosed, DaemonTimeout, DeviceFailed, ProtocolBroken
from tierd_client.gpu import arenas
from tierd_client.gpu.memfd_memory import MemfdMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.client.conftest import FakeDaemon


@pytest.fixture
def client(gpu_daemon: FakeDaemon) -> Iterator[Client]:
    with Client(gpu_daemon.path, tier="gpu:0", timeout=20) as client:
        yield client


def mapped(client: Client) -> set[int]:
    assert client._arenas is not None
    return client._arenas._maps[3]._mapped


def attended(daemon: FakeDaemon) -> list[Any]:
    return [request["unmapped"] for request in daemon.asked("attend")]


def let_go_unanswered(daemon: FakeDaemon, client: Client) -> None:
    """Chunk 0 is asked back and let go of; that this was said is not answered."""
    client.lease(MODEL, "embed").release()
    daemon.unmap = [0]
    daemon.table.call_attention()
    client._connection.timeout = 0.05

    def silent(message: dict[str, Any]) -> list[bytes] | None:
        return [] if message["op"] == "attend" and message["unmapped"] else None

    daemon.answers = silent
    with pytest.raises(DaemonTimeout):
        client.attend()
    daemon.answers = None
    client._connection.timeout = 20


def test_nothing_is_asked_while_the_daemon_wants_nothing(
    gpu_daemon: FakeDaemon, client: Client
) -> None:
    client.lease(MODEL, "embed").release()
    for _ in range(3):
        client.attend()
    assert gpu_daemon.asked("attend") == []


def test_chunks_that_are_asked_back_are_let_go_and_that_is_said_at_once(
    gpu_daemon: FakeDaemon, client: Client
) -> None:
    for name in ("embed", "blocks.0"):
        client.lease(MODEL, name).release()
    gpu_daemon.unmap = [0, 2]
    gpu_daemon.table.call_attention()
    client.attend()
    assert mapped(client) == {1}
    assert attended(gpu_daemon) == [[], [[3, [0, 2]]]]
    client.attend()
    assert len(gpu_daemon.asked("attend")) == 2


def test_a_chunk_that_was_let_go_is_fetched_again_with_what_it_holds_now(
    gpu_daemon: FakeDaemon, client: Client
) -> None:
    client.lease(MODEL, "blocks.1").release()
    gpu_daemon.unmap = [2]
    gpu_daemon.table.call_attention()
    client.attend()
    gpu_daemon.offsets[2], gpu_daemon.offsets[0] = CHUNK_BYTES, 2 * CHUNK_BYTES + (1 << 20)
    gpu_daemon.write_layers()
    with client.lease(MODEL, "embed") as lease:
        layer = bytes(lease.mapping.buffer(lease.offset, lease.layer.nbytes))
        assert layer == gpu_daemon.pack.layer_bytes(0)
    assert gpu_daemon.chunks_given == [2, 2]


def test_who_only_acquires_attends_before_it(gpu_daemon: FakeDaemon, client: Client) -> None:
    client.lease(MODEL, "embed").release()
    gpu_daemon.unmap = [0]
    gpu_daemon.table.call_attention()
    client.lease(MODEL, "blocks.0").release()
    assert mapped(client) == {1, 2}
    assert attended(gpu_daemon) == [[], [[3, [0]]]]


def test_a_chunk_that_this_process_does_not_have_is_let_go_all_the_same(
    gpu_daemon: FakeDaemon, client: Client
) -> None:
    client.open(MODEL)
    gpu_daemon.unmap = [3]
    gpu_daemon.table.call_attention()
    client.attend()
    assert gpu_daemon.unmap == []


def test_scratch_is_told_when_it_changes(gpu_daemon: FakeDaemon, client: Client) -> None:
    client.open(MODEL)
    for nbytes in (0, 100, 100, 300):
        client.attend(scratch_bytes=nbytes)
    assert [request["scratch_bytes"] for request in gpu_daemon.asked("attend")] == [100, 300]


def test_what_could_not_be_said_is_said_the_next_time(
    gpu_daemon: FakeDaemon, client: Client
) -> None:
    let_go_unanswered(gpu_daemon, client)
    client.attend()
    assert attended(gpu_daemon) == [[], [[3, [0]]], [[3, [0]]]]
    assert gpu_daemon.unmap == []


def test_what_is_mapped_again_after_an_answer_was_lost_is_not_said_to_be_let_go(
    gpu_daemon: FakeDaemon, client: Client
) -> None:
    let_go_unanswered(gpu_daemon, client)
    gpu_daemon.unmap = []  # it has heard it
    assert client._arenas is not None
    client._arenas.attended = True  # by somebody who is slow
    with client.lease(MODEL, "embed"):
        client.attend()
    assert mapped(client) == {0}
    assert attended(gpu_daemon)[2:] in ([], [[]])


def test_more_chunks_than_a_frame_has_room_for_are_said_in_parts(
    gpu_daemon: FakeDaemon, client: Client
) -> None:
    client.lease(MODEL, "embed").release()
    others = range(0xF0000000, 0xF0000000 + 3 * arenas.MOST_SAID)
    gpu_daemon.unmap = [*others, 0]
    gpu_daemon.table.call_attention()
    client.attend()
    assert gpu_daemon.unmap == []
    assert mapped(client) == set()
    sizes = [sum(len(chunks) for _, chunks in said) for said in attended(gpu_daemon)]
    assert sizes == [0, *[arenas.MOST_SAID] * 3, 1]


@pytest.mark.parametrize("problem", [OSError(12, "no memory"), DeviceFailed("cuMemUnmap failed")])
def test_a_chunk_that_cannot_be_let_go_is_tried_again_and_said_only_then(
    gpu_daemon: FakeDaemon, client: Client, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    for name in ("embed", "blocks.0", "odd"):
        client.lease(MODEL, name).release()
    unmap = MemfdMemory.unmap

    def broken(memory: MemfdMemory, chunk: int) -> None:
        if chunk == 1:
            raise problem
        unmap(memory, chunk)

    monkeypatch.setattr(MemfdMemory, "unmap", broken)
    gpu_daemon.unmap = [0, 1, 3]
    gpu_daemon.table.call_attention()
    for _ in range(2):
        with pytest.raises(type(problem)):
            client.attend()
        assert gpu_daemon.unmap == [1]
        assert mapped(client) == {1, 2}
    monkeypatch.setattr(MemfdMemory, "unmap", unmap)
    client.attend()
    assert gpu_daemon.unmap == []
    assert mapped(client) == {2}


@pytest.mark.parametrize("unmap", [[3], [[3, "x"]], [["3", [1]]], [[3, [1.5]]]])
def test_an_answer_that_makes_no_sense_ends_the_connection(
    gpu_daemon: FakeDaemon, client: Client, unmap: Any
) -> None:
    from tierd_layouts.wire import encode

    client.open(MODEL)
    gpu_daemon.answers = lambda message: (
        [encode({"id": message["id"], "ok": True, "pressed": False, "unmap": unmap})]
        if message["op"] == "attend"
        else None
    )
    with pytest.raises(ProtocolBroken, match="asks back"):
        client.attend(scratch_bytes=1)
    assert not client._connection.alive


@pytest.mark.parametrize("chunk_bytes", [0, 3 << 20, 1 << 40])
def test_an_arena_in_impossible_chunks_ends_the_connection(
    gpu_daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr("tests.client.conftest.CHUNK_BYTES", chunk_bytes)
    with (
        Client(gpu_daemon.path, tier="gpu:0") as client,
        pytest.raises(ProtocolBroken, match=f"in chunks of {chunk_bytes}"),
    ):
        client.open(MODEL)


def test_a_client_that_closes_lets_go_of_the_gpu_at_once(gpu_daemon: FakeDaemon) -> None:
    with Client(gpu_daemon.path, tier="gpu:0") as client:
        for name in ("embed", "blocks.0"):
            client.lease(MODEL, name).release()
        assert mapped(client) == {0, 1, 2}
    assert mapped(client) == set()


def test_what_is_leased_or_viewed_when_a_client_closes_stays_mapped(
    gpu_daemon: FakeDaemon,
) -> None:
    with Client(gpu_daemon.path, tier="gpu:0") as client:
        lease = client.lease(MODEL, "embed")  # another thread computes with it
        layer = lease.mapping.buffer(lease.offset, lease.layer.nbytes)
    assert mapped(client) == {0}
    assert bytes(layer) == gpu_daemon.pack.layer_bytes(0)
    with Client(gpu_daemon.path, tier="gpu:0") as client:
        view = client.lease(MODEL, "embed")["embed.weight"].view()
        client.lease(MODEL, "blocks.0").release()
    assert 0 in mapped(client)
    assert view.isfinite().all()


def test_nothing_is_let_go_before_the_last_grant_that_another_thread_may_get(
    gpu_daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(gpu_daemon.path, tier="gpu:0")
    client.lease(MODEL, "embed").release()
    leases = []

    def granted_meanwhile() -> bool:
        leases.append(client.lease(MODEL, "embed"))  # it passed every check before the close
        return False

    monkeypatch.setattr(client._connection.departures, "wait", granted_meanwhile)
    client.close()
    assert mapped(client) == {0}
    assert (
        bytes(leases[0].mapping.buffer(leases[0].offset, 8)) == gpu_daemon.pack.layer_bytes(0)[:8]
    )


def test_no_thread_gets_a_lease_while_a_closing_client_lets_go(
    gpu_daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(gpu_daemon.path, tier="gpu:0")
    opened = client.open(MODEL)
    opened.acquire(0).release()
    arenas = opened.arenas
    assert arenas is not None
    let_go, refused = arenas.let_go, []

    def while_letting_go() -> None:
        with pytest.raises(ClientClosed) as caught:
            opened.acquire(0)
        refused.append(caught.value)
        let_go()

    monkeypatch.setattr(arenas, "let_go", while_letting_go)
    client.close()
    assert refused
    assert mapped(client) == set()
