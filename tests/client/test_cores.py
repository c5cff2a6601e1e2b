from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import tierd_kernels
from tierd_client import cores
from tierd_kernels.cpu import MAX_THREADS
from tierd_layouts.packed_matrix import encode_raw

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


@pytest.mark.usefixtures("torch_threads")
def test_kernels_run_on_torchs_threads_as_many_as_those_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(cores, "_team", 0)
    monkeypatch.setattr(tierd_kernels, "share_threads", lambda *call: told.append(call))
    torch.set_num_threads(2)
    for _ in range(3):
        cores.kernel_threads(1)
    torch.set_num_threads(1)
    cores.kernel_threads(1)
    assert told == [(cores.openmp(), 2), (cores.openmp(), 1)]


def test_the_runtime_of_this_torch_is_found_and_expands() -> None:
    if "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this torch has other threads")
    assert cores.openmp() != 0
    bits = np.random.default_rng(0).integers(0, 3, (1000, 100), np.uint16)
    out = np.empty_like(bits)
    tierd_kernels.share_threads(cores.openmp(), 2)
    tierd_kernels.expand(encode_raw(bits, "BF16"), out, threads=2)
    np.testing.assert_array_equal(out, bits)


def test_the_processors_are_those_of_the_kernels() -> None:
    from tierd_kernels.cpus import default_threads

    assert cores.processors() == default_threads()
