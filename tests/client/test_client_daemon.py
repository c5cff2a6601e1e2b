"""The client library against the real daemon, in a process of its own."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tierd_client import (
    BudgetTooSmall,
    Client,
    DaemonGone,
    LayerNotFound,
    LeaseLimit,
    ModelNotFound,
    ViewStillAlive,
    private_daemon,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.client.conftest import TinyPack
    from tierd_client import Lease
    from tierd_client.private_daemon import PrivateDaemon

LAYERS = ["embed", "blocks.0", "blocks.1", "odd"]
NORM = "blocks.0.norm.weight"


@pytest.fixture(scope="module")
def served(pack: TinyPack) -> Iterator[PrivateDaemon]:
    with private_daemon.start(pack.folder, "64MiB") as daemon:
        yield daemon


@pytest.fixture
def client(served: PrivateDaemon) -> Iterator[Client]:
    with Client(served.socket, name="test", timeout=20) as client:
        yield client


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def leases_of(client: Client, name: str) -> int:
    return sum(row["leases"] for row in client.ask("clients")["clients"] if row["name"] == name)


def test_every_tensor_of_every_layer_has_the_bits_that_were_packed(
    client: Client, pack: TinyPack
) -> None:
    opened = client.open("tiny")
    assert opened.index == pack.index
    assert opened.files["config.json"] == b'{"model_type": "tiny"}'
    opened.plan(LAYERS)
    seen = set()
    for _ in range(2):
        for name in LAYERS:
            with client.lease("tiny", name) as lease:
                for tensor_name, tensor in lease.tensors.items():
                    unsigned = torch.uint16 if tensor.dtype.itemsize == 2 else torch.uint32
                    bits = tensor.dense().view(unsigned).numpy()
                    np.testing.assert_array_equal(bits, pack.bits.get(tensor_name, bits))
                    seen.add(tensor_name)
    assert seen >= pack.bits.keys()


def test_leases_ahead_run_through_a_cycle(client: Client) -> None:
    opened = client.open("tiny")
    assert opened.plan(LAYERS, kind="cyclic", lookahead=1) > 0
    pending = opened.acquire_ahead(0)
    for step in range(20):
        following = opened.acquire_ahead((step + 1) % 4)
        with pending.resolve() as lease:
            assert lease.layer.name == LAYERS[step % 4]
        pending = following
    pending.cancel()
    assert client.statistics().leases >= 20
    wait_until(lambda: leases_of(client, "test") == 0)


def test_the_daemon_sees_a_lease_begin_and_end(client: Client) -> None:
    with client.lease("tiny", "blocks.0"):
        assert leases_of(client, "test") == 1
    wait_until(lambda: leases_of(client, "test") == 0)


def test_a_live_view_keeps_the_slot_leased_at_the_daemon(client: Client) -> None:
    lease = client.lease("tiny", "blocks.0")
    view = lease[NORM].view()
    with pytest.raises(ViewStillAlive):
        lease.release()
    assert leases_of(client, "test") == 1
    assert view.shape == (100,)
    del view
    wait_until(lambda: leases_of(client, "test") == 0)


def test_what_is_not_there_is_named_by_the_daemon(client: Client) -> None:
    with pytest.raises(ModelNotFound, match="nobody"):
        client.open("nobody")
    opened = client.open("tiny")
    with pytest.raises(LayerNotFound):
        opened.connection.call("acquire", model_id=opened.model_id, layer=99, ahead=False)


@pytest.mark.parametrize("name", ["", "a/b", "..", "nul\0", "\ud800", "x" * 5000])
def test_a_name_that_no_model_can_have_is_not_found_and_costs_nothing(
    client: Client, name: str
) -> None:
    with pytest.raises(ModelNotFound, match="no model can have that name"):
        client.open(name)
    assert client.open("tiny").name == "tiny"


def test_threads_share_one_client_and_one_arena(client: Client, pack: TinyPack) -> None:
    client.open("tiny").plan(LAYERS)
    wrong: list[object] = []

    def work(name: str, tensor: str) -> None:
        for _ in range(30):
            with client.lease("tiny", name) as lease:
                bits = lease[tensor].dense().view(torch.uint16).numpy()
                if not np.array_equal(bits, pack.bits[tensor]):
                    wrong.append(lease)

    work_items = [("blocks.0", NORM), ("blocks.1", "blocks.1.up.weight")]
    threads = [threading.Thread(target=work, args=item) for item in work_items]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_a_plan_that_the_budget_cannot_hold_is_refused_with_both_sizes(pack: TinyPack) -> None:
    largest = max(pack.index.layers, key=lambda layer: layer.nbytes)
    with (
        private_daemon.start(pack.folder, str(largest.nbytes - 4096)) as daemon,
        Client(daemon.socket, timeout=20) as client,
    ):
        opened = client.open("tiny")
        with pytest.raises(BudgetTooSmall, match=str(largest.nbytes)):
            opened.plan(LAYERS)
        with pytest.raises(BudgetTooSmall, match=str(largest.nbytes)):
            client.lease("tiny", largest.name)


def test_a_lease_too_many_is_refused_and_there_is_room_again_after_a_release(
    client: Client,
) -> None:
    opened = client.open("tiny")
    held: list[Lease] = []

    def hold() -> None:
        for _ in range(2000):
            held.append(opened.acquire(len(held) % 4))

    with pytest.raises(LeaseLimit, match="1024 leases are held") as caught:
        hold()
    assert caught.value.code == "lease_limit"
    held.pop().release()
    opened.acquire(0).release()
    for lease in held:
        lease.release()
    assert client.statistics().held == 0


def test_a_killed_daemon_is_gone_for_every_call_and_nobody_hangs(pack: TinyPack) -> None:
    with private_daemon.start(pack.folder, "64MiB") as daemon:
        client = Client(daemon.socket, timeout=20)
        lease = client.lease("tiny", "blocks.0")
        expected = lease[NORM].dense()
        caught: list[BaseException] = []

        def ask() -> None:
            try:
                while True:
                    client.lease("tiny", "blocks.1").release()
            except DaemonGone as error:
                caught.append(error)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.1)
        begin = time.monotonic()
        os.kill(daemon.pid, signal.SIGKILL)
        for thread in threads:
            thread.join(10)
        assert time.monotonic() - begin < 5
        assert len(caught) == 2
        assert torch.equal(lease[NORM].dense(), expected)  # the memory outlives the daemon
        lease.release()
        with pytest.raises(DaemonGone):
            client.ask("status")
        client.close()


def test_a_client_killed_in_the_middle_of_a_lease_leaves_nothing_behind(
    client: Client, served: PrivateDaemon
) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with Client(served.socket, name="doomed") as doomed, doomed.lease("tiny", "blocks.0"):
            os.write(write, b"x")
            time.sleep(60)
        os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    assert leases_of(client, "doomed") == 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_until(lambda: leases_of(client, "doomed") == 0)
