from __future__ import annotations

import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.client.fake_streams import FakeStream, FakeStreams
from tests.client.fake_weights import FakeKernels, FakeLease, FakeLeases
from tierd_client.errors import DaemonGone, TensorCorrupt
from tierd_client.expansions import Expansions
from tierd_client.fault_cells import FaultCells

CPU = torch.device("cpu")
FAULT = 4 * 7 + 1  # tile 7, its head
SAID = r"^model/layer, 'b': tile 7: its head cannot be$"


class Model:
    """Three layers of two matrices each, `a` to `f`, filled with 1 to 6."""

    def __init__(self, passed_ms: float = float("inf")) -> None:
        self.streams = FakeStreams(passed_ms)
        self.kernels = FakeKernels(self.streams)
        self.leases = FakeLeases()
        self.leases.streams = self.streams
        self.cells = FaultCells(self.streams)
        self.expansions = Expansions(CPU, self.streams, self.kernels, self.cells, self.leases)
        self.contents = {name: torch.full((3, 4), 1.0 + at) for at, name in enumerate("abcdef")}
        for layer in range(3):
            self.grant(layer)

    def grant(self, layer: int) -> FakeLease:
        """A new lease of a layer; the old one ends."""
        if layer in self.leases.here:
            self.leases.here[layer].ended = True
        names = "abcdef"[2 * layer : 2 * layer + 2]
        lease = FakeLease({name: self.contents[name] for name in names})
        self.leases.here[layer] = lease
        return lease

    def use(self, name: str, lease: FakeLease | None = None) -> None:
        layer = "abcdef".index(name) // 2
        stored: Any = SimpleNamespace(name=name, layer=layer)
        lease = lease or self.leases.here[layer]
        with self.expansions.expanded(stored, lease[name]) as matrix:
            assert torch.equal(matrix.detach(), self.contents[name]), name

    def run(self, names: str, times: int = 1) -> list[tuple[str, str]]:
        """Use matrices; returns what was expanded, and in which stream."""
        self.kernels.expanded.clear()
        for name in names * times:
            self.use(name)
        return list(self.kernels.expanded)


def test_the_matrix_that_followed_the_last_time_is_expanded_aside_under_the_product() -> None:
    model = Model(passed_ms=0)
    # The pass that learns ends with a matrix whose follower is known.
    assert model.run("abcdef") == [(name, "default") for name in "abcdef"]
    model.run("ab")
    assert model.run("cdef", 1) == [(name, "side") for name in "defa"]
    assert model.run("abcdef", 3) == [(name, "side") for name in "bcdefa" * 3]
    assert model.expansions.ahead == model.expansions.used_ahead + 1
    assert not any(event.synchronized for event in model.streams.events)


def test_what_reads_aside_is_fenced_there() -> None:
    model = Model()
    model.run("abcdef", 2)
    assert set(model.leases.log) == {("fenced in side", layer) for layer in range(3)}


def test_a_layer_whose_lease_is_not_here_is_not_waited_for() -> None:
    model = Model()
    model.run("abcdef", 2)
    away = model.leases.here.pop(1)
    model.use("a")
    model.use("b")
    model.kernels.expanded.clear()
    model.use("c", away)
    assert model.kernels.expanded[0] == ("c", "default")


def test_wrong_guesses_are_never_computed_with() -> None:
    model = Model()
    order = random.Random(3)
    for _ in range(300):
        model.use(order.choice("abcdef"))  # compares the contents
    assert 0 < model.expansions.used_ahead < model.expansions.ahead
    assert model.expansions.totals()[0] < 600


def test_what_was_read_under_a_lease_that_is_gone_is_read_again() -> None:
    model = Model()
    model.run("abcdef", 2)
    model.use("a")
    assert model.kernels.expanded[-1] == ("b", "side")
    model.contents["b"] = torch.full((3, 4), 99.0)  # what the slot has now
    model.grant(0)
    model.use("b")
    assert ("b", "default") in model.kernels.expanded[-2:]


def test_a_matrix_that_was_never_met_is_not_expanded_aside() -> None:
    model = Model()
    model.run("ab")
    model.expansions._followers["a", "b"] = SimpleNamespace(name="c", layer=1)  # type: ignore[assignment]
    model.run("ab")
    assert ("c", "side") not in model.kernels.expanded


def test_a_fault_aside_is_raised_for_the_matrix_that_has_it() -> None:
    model = Model()
    model.run("abcdef", 2)
    model.leases.here[0].weights["b"].fault = FAULT
    model.use("a")  # expands b aside
    model.cells.sweep()
    with pytest.raises(TensorCorrupt, match=SAID):
        model.cells.raise_found()


def test_what_cannot_be_done_aside_fails_where_it_is_asked_for() -> None:
    model = Model()
    model.run("abcdef", 2)

    def refuse(layer: int) -> Any:
        raise DaemonGone("tierd is gone")

    model.leases.glimpse = refuse  # type: ignore[method-assign]
    model.run("abc")
    assert model.streams.current().name == "default"


def test_no_room_for_a_second_buffer_is_no_failure_and_not_tried_again() -> None:
    model = Model()
    model.run("abcdef")
    tried: list[Any] = []

    def full(*arguments: Any) -> Any:
        tried.append(arguments)
        raise torch.OutOfMemoryError("CUDA out of memory")

    scratch: Any = model.expansions._scratch
    scratch.filled_ahead = full
    model.run("abcdef", 2)
    assert len(tried) == 1
    assert model.expansions.ahead == 0


def test_threads_compute_with_their_own_matrices_in_two_buffers() -> None:
    model = Model()
    problems: list[BaseException] = []

    def run(number: int) -> None:
        model.streams.use(FakeStream(f"thread {number}"))
        order = random.Random(number)
        try:
            for _ in range(200):
                for name in "abcdef"[order.randrange(3) :]:
                    model.use(name)
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert model.expansions._scratch.buffers == 2


def test_a_matrix_is_waited_for_the_first_time_and_never_computed_with_if_it_is_wrong() -> None:
    model = Model(passed_ms=0)
    model.leases.here[0].weights["b"].fault = FAULT
    for _ in range(2):
        with pytest.raises(TensorCorrupt, match=SAID):
            model.use("b")
    model.leases.here[0].weights["b"].fault = -1 + 2**63
    model.use("b")


def test_its_memory_is_the_scratch_and_the_temporaries_of_the_largest_matrix() -> None:
    model = Model()
    assert model.expansions.nbytes == 0
    model.run("ab")
    assert model.expansions.nbytes == 3 * 4 * 4 + 3000
    model.run("ab", 2)
    assert model.expansions.nbytes == 2 * (3 * 4 * 4 + 3000)
