from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from tierd_client.departures import Departures

if TYPE_CHECKING:
    from collections.abc import Iterable


class Connection:
    def __init__(self) -> None:
        self.released: list[int] = []
        self.departures = Departures(self.release)

    def release(self, leases: Iterable[int]) -> None:
        self.released += leases


class Mark:
    def __init__(self, done: bool = False) -> None:
        self.done = done
        self.waited = 0

    def passed(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.waited += 1
        self.done = True


def test_what_nothing_uses_goes_at_once() -> None:
    connection = Connection()
    connection.departures.add(1, [])
    assert connection.released == [1]
    assert not connection.departures


def test_a_lease_goes_when_all_its_fences_have_passed() -> None:
    connection, first, second = Connection(), Mark(), Mark()
    connection.departures.add(1, [first, second])
    connection.departures.send()
    first.done = True
    connection.departures.send()
    assert connection.released == []
    second.done = True
    connection.departures.send()
    assert connection.released == [1]
    assert first.waited == second.waited == 0


def test_a_slow_stream_does_not_hold_up_another() -> None:
    connection = Connection()
    connection.departures.add(1, [Mark()])
    connection.departures.add(2, [Mark(done=True)])
    connection.departures.add(3, [Mark(done=True)])
    connection.departures.send()
    assert connection.released == [2, 3]
    assert len(connection.departures) == 1


def test_who_needs_room_waits_for_the_oldest() -> None:
    connection, marks = Connection(), [Mark(), Mark()]
    connection.departures.add(1, [marks[0]])
    connection.departures.add(2, [marks[1]])
    assert connection.departures.wait()
    assert connection.released == [1]
    assert [mark.waited for mark in marks] == [1, 0]
    assert connection.departures.wait()
    assert not connection.departures.wait()
    assert connection.released == [1, 2]


def test_a_connection_is_not_kept_alive_by_what_departs_from_it() -> None:
    connection = Connection()
    departures = connection.departures
    departures.add(1, [Mark(done=True)])
    gc.disable()
    try:
        del connection
        departures.send()  # its leases ended with it
    finally:
        gc.enable()
    assert not departures


def test_a_gpu_that_is_lost_keeps_its_leases_and_others_go() -> None:
    class Lost(Mark):
        def passed(self) -> bool:
            raise RuntimeError("illegal address")

        def wait(self) -> None:
            raise RuntimeError("illegal address")

    connection = Connection()
    connection.departures.add(1, [Mark(done=True)])
    connection.departures.add(2, [Lost()])
    connection.departures.add(3, [Mark(done=True)])
    with pytest.raises(RuntimeError):
        connection.departures.send()
    assert connection.released == [1]
    for _ in range(3):
        with pytest.raises(RuntimeError):
            connection.departures.wait()
        assert connection.released == [1, 3]
    assert len(connection.departures) == 1
