from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tierd_client import cores
from tierd_kernels.cpu import MAX_THREADS

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("torch_threads")
@pytest.mark.parametrize(
    ("processors", "wanted", "holders", "threads"),
    [
        (8, 8, 0, 8),  # nobody counts: as if alone
        (8, 8, 1, 8),
        (8, 8, 2, 4),
        (8, 8, 3, 3),  # rounded up: 9 threads on 8 processors, not 6
        (8, 8, 100, 1),
        (8, 3, 1, 3),  # torch was told to take less
        (8, 3, 2, 3),
        (2, 8, 1, 2),  # a quota, or an affinity, that torch does not know of
        (1, 1, 5, 1),
        (1000, 1000, 1, MAX_THREADS),
    ],
)
def test_a_kernel_takes_its_share_of_the_processors(
    processors: int, wanted: int, holders: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cores, "processors", lambda: processors)
    torch.set_num_threads(wanted)
    assert cores.kernel_threads(holders) == threads


def test_the_processors_are_those_of_the_kernels() -> None:
    from tierd_kernels.cpus import default_threads

    assert cores.processors() == default_threads()
