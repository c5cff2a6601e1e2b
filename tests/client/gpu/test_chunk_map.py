from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from tests.client.conftest import CHUNK_BYTES, MODEL
from tierd_client import Client
from tierd_client.errors import ProtocolBroken, Refused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.client.conftest import FakeDaemon


@pytest.fixture
def client(gpu_daemon: FakeDaemon) -> Iterator[Client]:
    with Client(gpu_daemon.path, tier="gpu:0", timeout=20) as client:
        yield client


def chunks_asked(daemon: FakeDaemon) -> list[list[int]]:
    return [request["chunks"] for request in daemon.asked("chunks")]


def test_a_layer_across_two_chunks_is_read_as_one(gpu_daemon: FakeDaemon, client: Client) -> None:
    with client.lease(MODEL, "blocks.0") as lease:
        assert chunks_asked(gpu_daemon) == [[1, 2]]
        layer = lease.mapping.buffer(lease.offset, lease.layer.nbytes)
        assert bytes(layer) == gpu_daemon.pack.layer_bytes(1)
        del layer


def test_a_chunk_is_asked_for_when_a_lease_first_touches_it(
    gpu_daemon: FakeDaemon, client: Client
) -> None:
    for name in ("embed", "blocks.0", "blocks.1", "embed", "odd", "blocks.0"):
        with client.lease(MODEL, name) as lease:
            number = gpu_daemon.pack.index.layers.index(lease.layer)
            layer = lease.mapping.buffer(lease.offset, lease.layer.nbytes)
            assert bytes(layer) == gpu_daemon.pack.layer_bytes(number)
            del layer
    assert chunks_asked(gpu_daemon) == [[0], [1, 2], [3]]


def test_more_chunks_than_one_request_may_name_are_asked_for_in_turn(
    gpu_daemon: FakeDaemon, client: Client
) -> None:
    opened = client.open(MODEL)
    gpu_daemon.span = 40 * CHUNK_BYTES
    chunks = client._arenas._maps[3] if client._arenas else None
    assert chunks is not None
    os.ftruncate(gpu_daemon.arena_fd, 40 * CHUNK_BYTES)
    # The memory has four chunks; only what is asked for is looked at.
    chunks.memory.map = lambda chunk, fd: None  # type: ignore[method-assign]
    chunks.memory.unmap = lambda chunk: None  # type: ignore[method-assign]
    chunks.populate(CHUNK_BYTES, 33 * CHUNK_BYTES)
    assert [len(asked) for asked in chunks_asked(gpu_daemon)] == [16, 16, 1]
    assert opened.arenas is client._arenas


def test_threads_that_touch_one_chunk_at_once_ask_for_it_once(
    gpu_daemon: FakeDaemon, client: Client
) -> None:
    opened = client.open(MODEL)
    leases = [opened.acquire_ahead(2) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda one=lease: one.resolve().release()) for lease in leases
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert chunks_asked(gpu_daemon) == [[2]]


def test_descriptors_are_closed_when_they_are_mapped(
    gpu_daemon: FakeDaemon, client: Client
) -> None:
    client.open(MODEL)
    before = len(os.listdir("/proc/self/fd"))
    client.lease(MODEL, "blocks.0").release()
    # The daemon of this test is this process, and closes its own a little later.
    gpu_daemon.wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_a_refused_chunk_gives_the_lease_back(gpu_daemon: FakeDaemon, client: Client) -> None:
    gpu_daemon.refusals["chunks"] = ("bad_request", "chunk 0 is not under a lease of yours")
    with pytest.raises(Refused, match="chunk 0 is not under a lease"):
        client.lease(MODEL, "embed")
    gpu_daemon.wait_until(lambda: not gpu_daemon.leases)


def test_what_is_no_chunk_ends_the_connection(gpu_daemon: FakeDaemon, client: Client) -> None:
    gpu_daemon.handle = b"h" * 64
    with pytest.raises(ProtocolBroken, match="memfd device's, and came as a handle"):
        client.lease(MODEL, "embed")
    assert not client._connection.alive


def test_models_of_one_arena_share_its_chunks(gpu_daemon: FakeDaemon, client: Client) -> None:
    client.lease(MODEL, "embed").release()
    client.lease("other", "embed").release()
    assert chunks_asked(gpu_daemon) == [[0]]


def test_each_connection_has_chunks_of_its_own(gpu_daemon: FakeDaemon, client: Client) -> None:
    client.lease(MODEL, "embed").release()
    with Client(gpu_daemon.path, tier="gpu:0") as other:
        other.lease(MODEL, "embed").release()
    assert chunks_asked(gpu_daemon) == [[0], [0]]
