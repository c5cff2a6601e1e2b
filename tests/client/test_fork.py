from __future__ import annotations

import faulthandler
import os
import signal
import traceback
from typing import TYPE_CHECKING

import pytest
import torch

from tierd_client import Client, ForkedClient
from tierd_client.mapping import mappings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.client.conftest import FakeDaemon

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

NORM = "blocks.0.norm.weight"


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.path, timeout=20) as client:
        yield client


def in_child(check: Callable[[], None]) -> int:
    """Run `check` in a forked child; its wait status, 0 when it passed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def test_whatever_the_parent_made_raises_in_the_child(client: Client) -> None:
    opened = client.open("tiny")
    config = opened.files["config.json"]
    pending = opened.acquire_ahead(2)
    lease = client.lease("tiny", "blocks.0")
    tensor = lease["blocks.0.up.weight"]
    norm = lease[NORM]
    x = torch.zeros(1, 100, dtype=torch.bfloat16)

    def check() -> None:
        for use in (
            lambda: client.ask("status"),
            lambda: client.open("tiny"),
            lambda: client.lease("tiny", "blocks.1"),
            lambda: opened.acquire(1),
            lambda: opened.acquire_ahead(1),
            lambda: opened.plan([0]),
            lambda: opened.close(),
            lambda: pending.resolve(),
            lambda: lease[NORM],
            lambda: lease.release(),
            lambda: lease.__enter__(),
            lambda: tensor.dense(),
            lambda: tensor.linear(x),
            lambda: norm.view(),
            lambda: opened.files["tierd.json"] and opened.files["nothing"],
        ):
            with pytest.raises((ForkedClient, KeyError)):
                use()
        with pytest.raises(ForkedClient, match=r"made before this process .* was forked"):
            client.ask("status")
        assert opened.files["config.json"] == config  # private memory stays readable
        pending.cancel()
        client.close()  # quiet: there is nothing of the child's to close

    assert in_child(check) == 0
    assert lease[NORM].dense().shape == (100,)
    lease.release()
    pending.resolve().release()


def test_the_parent_notices_nothing_of_a_child_that_came_and_went(
    daemon: FakeDaemon, client: Client
) -> None:
    with client.lease("tiny", "blocks.0") as lease:
        assert in_child(lambda: None) == 0
        client.ask("status")
        assert list(daemon.leases.values()) == [1]
        assert torch.equal(lease[NORM].view(), lease[NORM].dense())
    daemon.wait_until(lambda: not daemon.leases)
    assert len(daemon.asked("release")) == 1


def test_a_context_that_a_child_leaves_says_so_and_releases_nothing(
    daemon: FakeDaemon, client: Client
) -> None:
    lease = client.lease("tiny", "blocks.0")

    def check() -> None:
        with pytest.raises(ForkedClient):
            lease.__exit__(None, None, None)
        lease.__exit__(ValueError, ValueError("the user's"), None)

    assert in_child(check) == 0
    client.ask("status")
    assert list(daemon.leases.values()) == [1]
    lease.release()


def test_the_childs_garbage_releases_nothing(daemon: FakeDaemon, client: Client) -> None:
    held = [client.lease("tiny", "blocks.0")]
    views = [held[0][NORM].view()]

    def drop() -> None:
        held.clear()
        views.clear()

    assert in_child(drop) == 0
    client.ask("status")
    assert list(daemon.leases.values()) == [1]
    assert daemon.asked("release") == []
    views.clear()
    held.clear()


def test_the_connection_ends_with_the_parent_although_a_child_lives(daemon: FakeDaemon) -> None:
    client = Client(daemon.path)
    client.lease("tiny", "blocks.0").__enter__()
    lease = client.lease("tiny", "blocks.1")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    os.close(read)
    try:
        client.close()
        daemon.wait_until(lambda: not daemon.leases)
    finally:
        os.close(write)
        os.waitpid(child, 0)
    assert lease.ended


def test_a_child_that_reads_a_view_faults_instead_of_reading_another_layers_bytes(
    client: Client,
) -> None:
    with client.lease("tiny", "blocks.0") as lease:
        views = [lease[NORM].view()]
        assert views[0].numel() == 100

        def read() -> None:
            faulthandler.disable()  # it would print this death
            views[0].sum()

        status = in_child(read)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGSEGV
        views.clear()


def test_a_child_may_open_a_client_of_its_own(daemon: FakeDaemon, client: Client) -> None:
    expected = client.lease("tiny", "blocks.0")[NORM].dense()

    def check() -> None:
        with Client(daemon.path) as own, own.lease("tiny", "blocks.0") as lease:
            assert torch.equal(lease[NORM].dense(), expected)

    assert in_child(check) == 0
    client.lease("tiny", "blocks.1").release()


def test_a_fork_in_the_middle_of_another_threads_call_leaves_no_lock_behind(
    daemon: FakeDaemon, client: Client
) -> None:
    opened = client.open("tiny")

    def check() -> None:
        with pytest.raises(ForkedClient):
            client.ask("status")
        with pytest.raises(ForkedClient):
            opened.acquire(0)
        with Client(daemon.path) as own:
            own.lease("tiny", "blocks.0").release()

    # As if other threads were in the middle of everything when the process forks.
    with opened.connection._send_lock, opened.connection._lock, client._opening, mappings._lock:
        assert in_child(check) == 0
