from __future__ import annotations

import pytest
import torch

from tests.client.fake_streams import FakeStreams
from tierd_client.errors import TensorCorrupt
from tierd_client.fault_cells import BLOCK_CELLS, FaultCells
from tierd_kernels.faults import NO_FAULT

FAULT = 4 * 7 + 1  # tile 7, its head
SAID = r"^here/w: tile 7: its head cannot be$"


def test_each_matrix_has_a_cell_for_ever() -> None:
    cells = FaultCells(FakeStreams())
    found = [cells.cell(f"w{number}", "here") for number in range(BLOCK_CELLS + 3)]
    again = [cells.cell(f"w{number}", "here") for number in range(BLOCK_CELLS + 3)]
    assert [cell.data_ptr() for cell in found] == [cell.data_ptr() for cell in again]
    assert len({cell.data_ptr() for cell in found}) == BLOCK_CELLS + 3
    assert all(int(cell) == NO_FAULT and cell.dtype == torch.int64 for cell in found)


@pytest.mark.parametrize("number", [0, BLOCK_CELLS + 2])
def test_a_fault_is_raised_once_its_copy_has_come(number: int) -> None:
    streams = FakeStreams(passed_ms=0)
    cells = FaultCells(streams)
    for other in range(number + 1):
        cell = cells.cell(f"w{other}", "here/w" if other == number else "elsewhere")
    cells.sweep()
    cell.fill_(FAULT)
    streams.passed_ms = 1
    cells.raise_found()  # the copy is older than the fault
    cells.sweep()
    cells.sweep()
    cells.raise_found()
    assert streams.now_ms == 2, "one copy at a time"
    streams.passed_ms = 2
    with pytest.raises(TensorCorrupt, match=SAID):
        cells.raise_found()
    assert int(cell) == NO_FAULT
    cells.raise_found()
    cells.sweep()
    streams.passed_ms = 100
    cells.raise_found()


def test_without_cells_nothing_is_copied() -> None:
    streams = FakeStreams()
    cells = FaultCells(streams)
    cells.sweep()
    cells.raise_found()
    assert streams.events == []


def test_a_matrix_is_waited_for_until_it_was_right_once() -> None:
    cells = FaultCells(FakeStreams(passed_ms=0))
    cell = cells.cell("w", "here/w")
    for _ in range(2):
        cell.fill_(FAULT)
        with pytest.raises(TensorCorrupt, match=SAID):
            cells.raise_unmet("w")
        assert not cells.met("w")
    cells.raise_unmet("w")
    assert cells.met("w")
    cell.fill_(FAULT)
    cells.raise_unmet("w")
    assert int(cell) == FAULT, "left for a sweep"
