"""Leases of a GPU tier whose memory has fences: they go back when the GPU is through with them."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.client.conftest import MODEL
from tierd_client import Client
from tierd_client.attendant import Attendant
from tierd_client.errors import LeaseLimit, ViewStillAlive
from tierd_client.gpu.memfd_memory import MemfdMemory
from tierd_client.leasing import LayerLeases
from tierd_layouts.wire import encode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.client.conftest import FakeDaemon


class Gpu:
    """One whose marks pass when it is told so, or when somebody waits."""

    def __init__(self) -> None:
        self.marks: list[Mark] = []

    def mark(self, *, everywhere: bool = False) -> Mark:
        self.marks.append(Mark(everywhere))
        return self.marks[-1]

    def finish(self) -> None:
        for mark in self.marks:
            mark.done.set()


class Mark:
    def __init__(self, everywhere: bool) -> None:
        self.everywhere = everywhere
        self.done = threading.Event()
        self.waited = False

    def passed(self) -> bool:
        return self.done.is_set()

    def wait(self) -> None:
        self.waited = True
        self.done.set()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    gpu = Gpu()
    monkeypatch.setattr(MemfdMemory, "fence", lambda memory: gpu.mark())
    monkeypatch.setattr(MemfdMemory, "fence_all", lambda memory: gpu.mark(everywhere=True))
    return gpu


@pytest.fixture
def client(gpu_daemon: FakeDaemon, gpu: Gpu) -> Iterator[Client]:
    with Client(gpu_daemon.path, tier="gpu:0", timeout=20) as client:
        yield client


def held(daemon: FakeDaemon) -> list[int]:
    return sorted(daemon.leases.values())


def test_a_lease_goes_back_when_the_mark_behind_its_use_has_passed(
    gpu_daemon: FakeDaemon, client: Client, gpu: Gpu
) -> None:
    client.lease(MODEL, "embed").release()
    assert len(gpu.marks) == 1
    client.lease(MODEL, "blocks.0")
    assert held(gpu_daemon) == [0, 1]
    gpu.marks[0].done.set()
    client.attend()
    gpu_daemon.wait_until(lambda: 0 not in held(gpu_daemon))
    assert not gpu.marks[0].waited


def test_a_lease_that_is_dropped_waits_for_all_streams(
    gpu_daemon: FakeDaemon, client: Client, gpu: Gpu
) -> None:
    lease = client.lease(MODEL, "embed")
    del lease
    assert [mark.everywhere for mark in gpu.marks] == [True]
    assert held(gpu_daemon) == [0]
    gpu.finish()
    client.attend()
    gpu_daemon.wait_until(lambda: held(gpu_daemon) == [])


def test_a_later_request_sends_what_has_passed_before_itself(
    gpu_daemon: FakeDaemon, client: Client, gpu: Gpu
) -> None:
    client.lease(MODEL, "embed").release()
    gpu.finish()
    client.lease(MODEL, "blocks.0")
    ops = [request["op"] for request in gpu_daemon.requests]
    assert ops[2:] == ["acquire", "chunks", "release", "acquire", "chunks"]
    assert held(gpu_daemon) == [1]


def test_a_lease_goes_back_behind_the_uses_of_all_threads(
    gpu_daemon: FakeDaemon, client: Client, gpu: Gpu
) -> None:
    leases = LayerLeases(client.open(MODEL), ())
    leases.enter(0)

    def use() -> None:
        leases.enter(0)
        leases.leave(0)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    leases.leave(0)
    assert len(gpu.marks) == 2
    gpu.marks[1].done.set()
    client.attend()
    client.ask("status")
    assert held(gpu_daemon) == [0]
    gpu.marks[0].done.set()
    client.attend()
    client.ask("status")
    assert held(gpu_daemon) == []


def test_a_lease_that_is_kept_has_marks_of_its_last_uses_only(
    gpu_daemon: FakeDaemon, client: Client, gpu: Gpu
) -> None:
    gpu_daemon.table.pressed = False
    leases = LayerLeases(client.open(MODEL), (0,))
    for _ in range(10):
        lease = leases.enter(0)
        leases.leave(0)
        gpu.finish()
    assert len(lease._fences) == 1
    leases.close()


def test_who_needs_room_waits_for_the_gpu_and_gets_it(
    gpu_daemon: FakeDaemon, client: Client, gpu: Gpu
) -> None:
    client.lease(MODEL, "embed").release()
    client.lease(MODEL, "blocks.0").release()

    def full(message: dict[str, Any]) -> list[bytes] | None:
        if message["op"] != "acquire" or 0 not in held(gpu_daemon):
            return None
        error = {"code": "lease_limit", "text": "client holds 2"}
        return [encode({"id": message["id"], "ok": False, "error": error})]

    gpu_daemon.answers = full
    with client.lease(MODEL, "odd"):
        pass
    assert [mark.waited for mark in gpu.marks] == [True, False, False]


def test_who_holds_all_itself_is_told_the_daemons_reason(
    gpu_daemon: FakeDaemon, client: Client, gpu: Gpu
) -> None:
    client.open(MODEL)
    gpu_daemon.refusals["acquire"] = ("lease_limit", "client holds 2")
    with pytest.raises(LeaseLimit, match="client holds 2"):
        client.lease(MODEL, "odd")


def test_a_view_that_outlives_its_lease_puts_a_mark_behind_its_own_end(
    gpu_daemon: FakeDaemon, client: Client, gpu: Gpu
) -> None:
    lease = client.lease(MODEL, "embed")
    view = lease["embed.weight"].view()
    with pytest.raises(ViewStillAlive):
        lease.release()
    gpu.finish()
    client.attend()
    client.ask("status")
    assert held(gpu_daemon) == [0]
    del view
    assert [mark.everywhere for mark in gpu.marks] == [False, True]
    client.attend()
    client.ask("status")
    assert held(gpu_daemon) == [0]
    gpu.finish()
    client.attend()
    gpu_daemon.wait_until(lambda: held(gpu_daemon) == [])


def test_a_client_that_closes_waits_for_the_gpu(gpu_daemon: FakeDaemon, gpu: Gpu) -> None:
    with Client(gpu_daemon.path, tier="gpu:0") as client:
        client.lease(MODEL, "embed").release()
        client.lease(MODEL, "odd")
    assert [mark.waited for mark in gpu.marks] == [True, True]
    assert [mark.everywhere for mark in gpu.marks] == [False, True]
    gpu_daemon.wait_until(lambda: len(gpu_daemon.asked("release")) == 2)


def test_the_attendant_gives_back_what_has_passed_and_answers_the_daemon(
    gpu_daemon: FakeDaemon, client: Client, gpu: Gpu
) -> None:
    scratch = [0]
    leases = LayerLeases(client.open(MODEL), (0, 1))
    attendant = Attendant(leases, lambda: scratch[0])
    try:
        leases.enter(0)
        leases.leave(0)
        time.sleep(0.15)
        assert 0 in held(gpu_daemon)
        gpu.finish()
        gpu_daemon.wait_until(lambda: 0 not in held(gpu_daemon))
        gpu_daemon.unmap = [0]
        gpu_daemon.table.call_attention()
        gpu_daemon.wait_until(lambda: gpu_daemon.unmap == [])
        scratch[0] = 4096
        gpu_daemon.wait_until(lambda: gpu_daemon.asked("attend")[-1]["scratch_bytes"] == 4096)
    finally:
        leases.close()
        attendant.stop(client.close)


def test_a_quiet_model_on_a_gpu_keeps_its_leases(
    gpu_daemon: FakeDaemon, client: Client, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierd_client.attendant.QUIET_S", 0.01)
    gpu_daemon.table.pressed = False
    leases = LayerLeases(client.open(MODEL), (0, 1, 2))
    attendant = Attendant(leases)
    try:
        for layer in (0, 1, 2):
            leases.enter(layer)
            leases.leave(layer)
        time.sleep(0.2)
        assert held(gpu_daemon) == [0, 1, 2]
    finally:
        leases.close()
        attendant.stop(client.close)


def test_what_a_dead_daemon_had_on_the_gpu_is_let_go_once_nothing_reads_it(
    gpu_daemon: FakeDaemon, client: Client, gpu: Gpu
) -> None:
    gpu_daemon.table.pressed = False
    leases = LayerLeases(client.open(MODEL), (0, 1, 2))
    attendant = Attendant(leases)
    mapped = client._arenas._maps[3]._mapped if client._arenas else set()
    try:
        for layer in (0, 1, 2):
            leases.enter(layer)
            leases.leave(layer)
        lease: Any = leases.enter(0)
        view = lease["embed.weight"].view()
        gpu_daemon.stop()
        gpu_daemon.wait_until(lambda: not client._connection.alive)
        time.sleep(0.15)
        assert mapped == {0, 1, 2}  # somebody computes, and the GPU is not through either
        with pytest.raises(ViewStillAlive):
            leases.leave(0)
        gpu.finish()
        time.sleep(0.15)
        assert mapped == {0, 1, 2}
        assert view.isfinite().all()
        del view, lease
        gpu.finish()
        gpu_daemon.wait_until(lambda: mapped == set())
    finally:
        leases.close()
        attendant.stop(client.close)


def test_a_turn_that_fails_is_said_once_and_the_next_one_comes(
    gpu_daemon: FakeDaemon,
    client: Client,
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    leases = LayerLeases(client.open(MODEL), (0,))
    turns: list[float] = []

    def tend(quiet_s: float | None) -> None:
        turns.append(time.monotonic())
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(leases, "tend", tend)
    attendant = Attendant(leases)
    gpu_daemon.unmap = [3]
    gpu_daemon.table.call_attention()
    try:
        gpu_daemon.wait_until(lambda: gpu_daemon.unmap == [] and len(turns) > 3)
        assert [record.getMessage() for record in caplog.records] == [
            "tiny: a turn of the attendant failed: RuntimeError: CUDA error: an illegal memory "
            "access was encountered"
        ]
    finally:
        leases.close()
        attendant.stop(client.close)
