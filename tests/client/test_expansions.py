from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.client.fake_streams import FakeStreams
from tierd_client.errors import TensorCorrupt
from tierd_client.expansions import ROOM_BYTES, Expansions
from tierd_kernels.torch_expand import NO_FAULT, TILE_BYTES, fault_text
from tierd_kernels.torch_expand import ROOM_BYTES as KERNEL_ROOM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

CPU = torch.device("cpu")
FAULT = 4 * 7 + 1  # tile 7, its head


class FakeWeight:
    """A PackedTensor whose expansion leaves `fault` in the cell."""

    def __init__(self, name: str = "w", fault: int = NO_FAULT) -> None:
        self.name = name
        self.where = f"model/layer, {name!r}"
        self.shape = (3, 4)
        self.dtype = torch.float32
        self.fault = fault
        self.measured = 0
        self.calls: list[dict[str, Any]] = []

    def limits(self) -> tuple[int, int]:
        self.measured += 1
        return 3, 17

    def expand_into(self, out: torch.Tensor, **options: Any) -> None:
        self.calls.append(options)
        out.detach().fill_(len(self.calls))
        cell = options["faults"]
        if cell is not None:
            assert int(cell) == NO_FAULT, "a cell that was used before is clean again"
            cell.fill_(self.fault)
        elif self.fault != NO_FAULT:
            raise TensorCorrupt(f"{self.where}: {fault_text(self.fault)}")


def expand(expansions: Expansions, weight: Any) -> torch.Tensor:
    with expansions.expanded(weight) as matrix:
        return matrix.detach().clone()


def test_the_matrix_is_expanded_into_scratch_with_what_was_measured_once() -> None:
    expansions, weight = Expansions(CPU, FakeStreams()), FakeWeight()
    for number in range(1, 4):
        assert torch.equal(expand(expansions, weight), torch.full((3, 4), float(number)))
    assert weight.measured == 1
    assert all(call["limits"] == (3, 17) for call in weight.calls)
    assert all(call["room_bytes"] == ROOM_BYTES > KERNEL_ROOM_BYTES for call in weight.calls)


def test_its_memory_is_the_scratch_and_the_temporaries_of_the_largest_matrix() -> None:
    expansions, large = Expansions(CPU, FakeStreams()), FakeWeight()
    large.shape = (65, 128)
    for weight in (FakeWeight(), large, FakeWeight()):
        expand(expansions, weight)
    assert expansions.nbytes == 65 * 128 * 4 + 4 * TILE_BYTES
    large.shape = (64, 1 << 18)
    expand(expansions, large)
    assert expansions.nbytes == 64 * (1 << 18) * 4 + ROOM_BYTES


def test_no_memory_is_used_before_the_first_one() -> None:
    assert Expansions(CPU, FakeStreams()).nbytes == 0


def test_the_time_is_between_two_marks_and_counts_when_they_have_passed() -> None:
    streams = FakeStreams(passed_ms=0)
    expansions, weight = Expansions(CPU, streams), FakeWeight()
    for _ in range(3):
        expand(expansions, weight)
    assert expansions.totals() == (3, 0), "they are still under way"
    streams.passed_ms = 5  # each expansion has two marks, and scratch one behind it
    assert expansions.totals() == (3, 2_000_000)
    streams.passed_ms = 100
    assert expansions.totals() == (3, 3_000_000)
    assert expansions.totals() == (3, 3_000_000)


def test_marks_that_have_passed_are_used_again_and_no_others() -> None:
    streams = FakeStreams()
    expansions, weight = Expansions(CPU, streams), FakeWeight()
    for _ in range(10):
        expand(expansions, weight)
    made = len(streams.events)
    assert made == 3, "begin, end, and the buffer's"
    streams.passed_ms = streams.now_ms  # what comes now stays under way
    for _ in range(4):
        expand(expansions, weight)
    assert len(streams.events) == made + 2 * 4 - 2
    cells = {id(call["faults"]) for call in weight.calls[-4:]}
    assert len(cells) == 4, "those under way share no cell"


def test_a_matrix_is_waited_for_the_first_time_and_never_again() -> None:
    streams = FakeStreams(passed_ms=0)
    expansions, first, second = Expansions(CPU, streams), FakeWeight("a"), FakeWeight("b")
    for weight in (first, second, first, second):
        expand(expansions, weight)
    for weight in (first, second):
        assert [call["faults"] is None for call in weight.calls] == [True, False]
    expansions.totals()
    assert not any(event.synchronized for event in streams.events)


def test_a_matrix_that_is_wrong_is_never_computed_with() -> None:
    expansions, bad = Expansions(CPU, FakeStreams(passed_ms=0)), FakeWeight("bad", FAULT)
    for _ in range(2):
        with pytest.raises(TensorCorrupt, match=r"^model/layer, 'bad': tile 7: its head cannot be"):
            expand(expansions, bad)
    bad.fault = NO_FAULT
    expand(expansions, bad)


def test_what_goes_wrong_later_is_raised_by_the_next_one_after_the_device_is_through() -> None:
    streams = FakeStreams(passed_ms=0)
    expansions = Expansions(CPU, streams)
    good, bad = FakeWeight(), FakeWeight("bad")
    expand(expansions, bad)
    bad.fault = FAULT
    expand(expansions, bad)
    expand(expansions, good)
    streams.passed_ms = 100
    with pytest.raises(TensorCorrupt, match=r"^model/layer, 'bad': tile 7: its head cannot be$"):
        expand(expansions, good)
    expand(expansions, good)  # said once
    assert expansions.totals()[0] == 4


def test_asking_for_totals_keeps_what_was_wrong_for_who_computes() -> None:
    expansions, bad = Expansions(CPU, FakeStreams()), FakeWeight()
    expand(expansions, bad)
    bad.fault = FAULT
    expand(expansions, bad)
    assert expansions.totals()[0] == 2
    with pytest.raises(TensorCorrupt, match="tile 7"):
        expand(expansions, FakeWeight())


def test_one_that_fails_at_once_leaves_the_others_as_they_were() -> None:
    expansions, bad = Expansions(CPU, FakeStreams()), FakeWeight()

    def fail(out: torch.Tensor, **options: Any) -> None:
        raise TensorCorrupt("arrays that do not fit")

    expand_into: Callable[..., None] = fail
    bad.expand_into = expand_into  # type: ignore[method-assign]
    with pytest.raises(TensorCorrupt, match="do not fit"):
        expand(expansions, bad)
    expand(expansions, FakeWeight())
    assert expansions.totals()[0] == 1
