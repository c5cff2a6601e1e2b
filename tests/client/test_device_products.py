from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from tests.client.fake_streams import FakeStreams
from tests.client.fake_weights import FakeKernels, FakeLease, FakeLeases
from tierd_client.device_products import LOOK_EVERY, TIMED_EVERY, DeviceProducts
from tierd_client.errors import TensorCorrupt

CPU = torch.device("cpu")
FAULT = 4 * 7 + 1  # tile 7, its head


class Model:
    """One layer with the matrices `a` and `b`."""

    def __init__(self, fused: bool = True, fused_up_to: int = 4, passed_ms: float = 0) -> None:
        torch.manual_seed(1)
        self.streams = FakeStreams(passed_ms)
        self.kernels = FakeKernels(self.streams, fused_up_to)
        self.leases = FakeLeases()
        self.lease = FakeLease({name: torch.randn(3, 6) for name in "ab"})
        self.leases.here[0] = self.lease
        self.products = DeviceProducts(CPU, self.streams, self.kernels, self.leases, fused)

    def linear(self, name: str, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        def product(x: torch.Tensor, weight: Any, matrix: torch.Tensor, bias: Any) -> torch.Tensor:
            return functional.linear(x, matrix.detach(), bias)

        stored: Any = SimpleNamespace(name=name, layer=0)
        return self.products.linear(stored, self.lease[name], x, bias, product)


@pytest.mark.parametrize("lead", [(1,), (4,), (2, 2), (5,), (2, 3), (), (0,)])
@pytest.mark.parametrize("bias", [None, torch.ones(3)])
def test_few_tokens_are_multiplied_in_place_and_more_after_expanding(
    lead: tuple[int, ...], bias: torch.Tensor | None
) -> None:
    model = Model()
    x = torch.randn(*lead, 6)
    tokens = x.numel() // 6
    got = model.linear("a", x, bias)
    assert got.shape == (*lead, 3)
    torch.testing.assert_close(got, functional.linear(x, model.lease["a"].content, bias))
    few = tokens <= 4
    assert model.kernels.multiplied == ([("a", tokens)] if few else [])
    assert model.kernels.expanded == ([] if few else [("a", "default")])


def test_dense_expands_always_and_asks_for_no_plan() -> None:
    model = Model(fused=False)
    model.linear("a", torch.randn(1, 6))
    assert (model.kernels.planned, model.kernels.multiplied) == ([], [])
    assert model.kernels.expanded == [("a", "default")]


def test_a_strided_input_is_given_to_the_kernel_row_by_row() -> None:
    model = Model()
    x = torch.randn(2, 6, 2)[..., 0].bfloat16()
    model.lease = FakeLease({"a": torch.randn(3, 6).bfloat16()})
    got = model.linear("a", x, torch.ones(3))
    assert got.dtype == torch.bfloat16
    assert model.kernels.multiplied == [("a", 2)]


def test_the_kernels_are_asked_for_a_plan_once_for_each_number_of_tokens() -> None:
    model = Model()
    for tokens in (1, 2, 1, 2, 9, 9):
        model.linear("a", torch.randn(tokens, 6))
    assert model.kernels.planned == [("a", 1), ("a", 2), ("a", 9)]


def test_all_products_are_counted_and_a_few_timed() -> None:
    model = Model()
    for _ in range(TIMED_EVERY + 1):
        model.linear("a", torch.randn(1, 6))
    timed = [event for event in model.streams.events if event.at_ms is not None]
    assert len(timed) <= 2 * 2 + 1
    model.linear("a", torch.randn(9, 6))
    counters = model.products.counters()
    assert (counters.fused_calls, counters.fused_ns) == (TIMED_EVERY + 1, 0)
    assert (counters.expansions, counters.blocked_calls) == (1, 0)
    model.streams.passed_ms = 1000
    assert model.products.counters().fused_ns == (TIMED_EVERY + 1) * 1_000_000


def test_a_matrix_that_is_wrong_is_never_multiplied_with() -> None:
    model = Model()
    model.lease["b"].fault = FAULT
    for tokens in (1, 9):
        with pytest.raises(TensorCorrupt, match=r"^model/layer, 'b': tile 7: its head cannot be$"):
            model.linear("b", torch.randn(tokens, 6))


@pytest.mark.parametrize("tokens", [1, 9])
def test_what_goes_wrong_later_is_raised_by_a_later_product(tokens: int) -> None:
    model = Model(passed_ms=float("inf"))
    for name in "ab":
        model.linear(name, torch.randn(tokens, 6))
    model.lease["b"].fault = FAULT
    model.linear("b", torch.randn(tokens, 6))
    model.lease["b"].fault = 2**63 - 1

    def go_on() -> None:
        for _ in range(2 * LOOK_EVERY + 2):
            model.linear("a", torch.randn(tokens, 6))

    with pytest.raises(TensorCorrupt, match=r"^model/layer, 'b': tile 7: its head cannot be$"):
        go_on()
    go_on()  # said once


def test_the_next_pass_but_one_raises_what_a_pass_found() -> None:
    model = Model()
    model.linear("a", torch.randn(1, 6))
    model.lease["a"].fault = FAULT
    model.products.begin_pass()
    model.linear("a", torch.randn(1, 6))
    model.streams.passed_ms = model.streams.now_ms
    model.products.begin_pass()
    model.streams.passed_ms = model.streams.now_ms
    with pytest.raises(TensorCorrupt, match="'a': tile 7"):
        model.products.begin_pass()


def test_every_kernel_notes_its_faults_in_the_cell_of_its_matrix() -> None:
    model = Model()
    for tokens in (1, 9):
        for name in "abab":
            model.linear(name, torch.randn(tokens, 6))
    assert all(cell is not None for cell in model.kernels.cells)
    assert len({cell.data_ptr() for cell in model.kernels.cells if cell is not None}) == 2
