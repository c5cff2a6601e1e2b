from __future__ import annotations

import gc
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tierd_client import Client, attendant
from tierd_client.attendant import Attendant
from tierd_client.errors import DaemonGone, DaemonTimeout
from tierd_client.leasing import LayerLeases

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.client.conftest import FakeDaemon

ORDER = (0, 1, 2, 3)


class Model:
    """What `load_model` makes of a client, without a model."""

    def __init__(self, daemon: FakeDaemon) -> None:
        self.daemon = daemon
        self.client = Client(daemon.path)
        self.leases = LayerLeases(self.client.open("tiny"), ORDER)
        self.attendant = Attendant(self.leases)

    def run_pass(self) -> None:
        self.leases.begin_pass()
        for layer in ORDER:
            self.leases.enter(layer)
            self.leases.leave(layer)
        self.leases.end_pass()

    def stop(self) -> None:
        self.leases.close()
        self.attendant.stop(self.client.close)


@pytest.fixture
def model(daemon: FakeDaemon) -> Iterator[Model]:
    daemon.capabilities = ["gpu"]
    model = Model(daemon)
    yield model
    model.stop()


def test_a_model_that_fits_sends_nothing_after_its_first_pass(model: Model) -> None:
    model.run_pass()
    model.run_pass()  # the first layer of it was asked for by the first pass
    sent = len(model.daemon.requests)
    for _ in range(5):
        model.run_pass()
    time.sleep(3 * attendant.PERIOD_S)  # nor does the thread
    model.run_pass()
    assert len(model.daemon.requests) == sent
    assert sorted(model.daemon.leases.values()) == list(ORDER)


def test_an_idle_model_gives_memory_back_that_others_need(model: Model) -> None:
    model.run_pass()
    model.run_pass()
    assert len(model.daemon.leases) == 4
    model.daemon.table.pressed = True
    model.daemon.wait_until(lambda: len(model.daemon.leases) == 1)
    model.run_pass()
    model.daemon.wait_until(lambda: list(model.daemon.leases.values()) == [0])


def test_a_daemon_that_does_not_say_whether_memory_is_short_gets_everything_back(
    daemon: FakeDaemon,
) -> None:
    model = Model(daemon)  # an older daemon: no capability, 0 where `pressed` would be
    model.run_pass()
    daemon.wait_until(lambda: list(daemon.leases.values()) == [0])
    model.stop()


def test_a_model_that_was_quiet_for_long_keeps_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attendant, "QUIET_S", 0.1)
    model.run_pass()
    model.run_pass()
    model.daemon.wait_until(lambda: list(model.daemon.leases.values()) == [0])


def test_a_daemon_that_died_is_noticed_although_nothing_is_asked(model: Model) -> None:
    model.run_pass()
    model.run_pass()
    model.daemon.stop()
    deadline = time.monotonic() + 10
    while model.client._connection.alive:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(DaemonGone):
        model.run_pass()


def test_the_thread_ends_with_the_model_also_when_the_daemon_is_gone(model: Model) -> None:
    assert model.attendant.alive
    model.daemon.stop()
    time.sleep(3 * attendant.PERIOD_S)
    model.stop()
    assert not model.attendant.alive


def test_a_call_without_an_answer_does_not_end_the_thread(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[float] = []

    def tend(quiet_s: float | None) -> None:
        turns.append(time.monotonic())
        raise DaemonTimeout("no answer")

    monkeypatch.setattr(model.leases, "tend", tend)
    model.daemon.wait_until(lambda: len(turns) > 2)
    assert model.attendant.alive


def test_a_model_collected_in_the_thread_itself_ends_without_a_deadlock(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    tend = model.leases.tend

    def end() -> None:
        model.leases.close()  # takes the lock
        ended.append(threading.current_thread().name)

    def collect(quiet_s: float | None) -> None:
        with model.leases._lock:  # as if a garbage collection began in here
            model.attendant.stop(end)
        monkeypatch.setattr(model.leases, "tend", tend)

    monkeypatch.setattr(model.leases, "tend", collect)
    model.daemon.wait_until(lambda: ended == ["tierd-attendant"])
    model.daemon.wait_until(lambda: not model.attendant.alive)


def test_a_forked_child_has_no_thread_and_its_parents_goes_on(model: Model) -> None:
    model.run_pass()
    child = os.fork()
    if child == 0:
        names = [thread.name for thread in threading.enumerate()]
        os._exit(1 if "tierd-attendant" in names or model.attendant.alive else 7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert model.attendant.alive


def test_a_lease_with_a_view_that_lives_is_not_kept(model: Model) -> None:
    model.leases.enter(0)
    lease: Any = model.leases.current(0)
    view = lease["embed.weight"].view()
    with pytest.raises(Exception, match="view of embed"):
        model.leases.leave(0)
    assert 0 in model.daemon.leases.values()
    del view
    gc.collect()
    model.daemon.wait_until(lambda: 0 not in model.daemon.leases.values())


def test_a_kept_lease_whose_slot_changed_is_reported_at_its_next_use(model: Model) -> None:
    model.run_pass()
    model.run_pass()
    model.daemon.set_generations(50)
    with pytest.raises(Exception, match="changed from generation 1 to 50"):
        model.run_pass()
