from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional

from tests.client.fake_streams import FakeStreams
from tierd_client import compute
from tierd_client.compute import Arithmetic, Compute
from tierd_client.errors import UnsupportedDevice, UnsupportedOperation

if TYPE_CHECKING:
    from tierd_client.scratch import Scratch

STORED: Any = SimpleNamespace(name="w", layer=5)


class FakeWeight:
    """A PackedTensor in private memory."""

    def __init__(self, matrix: torch.Tensor, packed: bool) -> None:
        self.matrix = matrix
        self.packed = packed
        self.shape = tuple(matrix.shape)
        self.dtype = matrix.dtype
        self.outs: list[torch.Tensor] = []
        self.fused_rows: list[int] = []
        self.blocked_rows: list[int] = []

    def dense(self, out: torch.Tensor) -> torch.Tensor:
        out.detach().copy_(self.matrix)
        self.outs.append(out)
        return out

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        self.fused_rows.append(x.numel() // x.shape[-1])
        return functional.linear(x, self.matrix, bias)

    def blocked(self, x: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> torch.Tensor:
        self.blocked_rows.append(x.numel() // x.shape[-1])
        block = scratch.matrix((1, 6), self.dtype)
        assert not block.is_inference()
        return functional.linear(x, self.matrix, bias)

    def unchecked_view(self) -> torch.Tensor:
        return self.matrix.view(self.matrix.shape)

    view = unchecked_view


class FakeLeases:
    def __init__(self, weight: FakeWeight, inside: bool = True) -> None:
        self.lease = {"w": weight}
        self.inside = inside
        self.log: list[str] = []

    def current(self, layer: int) -> Any:
        return self.lease if self.inside else None

    def enter(self, layer: int) -> Any:
        self.log.append(f"enter {layer}")
        return self.lease

    def leave(self, layer: int) -> None:
        self.log.append(f"leave {layer}")


def arithmetic(leases: Any, mode: str = "dense") -> Arithmetic:
    return Arithmetic(leases, Compute(mode))


@pytest.mark.parametrize("rows", [1, 100])
def test_dense_is_one_linear_on_the_whole_matrix(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted below torch's own functional, so that no cut into pieces goes unseen."""
    weight = FakeWeight(torch.randn(5, 6), packed=True)
    seen: list[tuple[int, ...]] = []

    def linear(x: torch.Tensor, matrix: torch.Tensor, bias: Any) -> torch.Tensor:
        seen.append(tuple(matrix.shape))
        return torch._C._nn.linear(x, matrix, bias)

    monkeypatch.setattr(functional, "linear", linear)
    leases = FakeLeases(weight)
    with torch.no_grad():
        arithmetic(leases).linear(STORED, torch.randn(2, rows, 6), None)
    assert seen == [(5, 6)]
    assert weight.fused_rows == []


@pytest.mark.parametrize("mode", ["dense", "fused"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 100])
def test_the_product_is_that_of_a_linear_in_memory(
    mode: str, packed: bool, bias: bool, rows: int
) -> None:
    linear = torch.nn.Linear(6, 5, bias=bias)
    weight = FakeWeight(linear.weight.detach(), packed)
    x = torch.randn(2, rows, 6)
    with torch.no_grad():
        got = arithmetic(FakeLeases(weight), mode).linear(STORED, x, linear.bias)
        assert torch.equal(got, linear(x))
    assert bool(weight.outs) == (packed and mode == "dense")
    assert bool(weight.fused_rows) == (packed and mode == "fused" and rows == 1)
    assert bool(weight.blocked_rows) == (packed and mode == "fused" and rows == 100)


@pytest.mark.parametrize("packed", [True, False])
def test_a_strided_batch_is_multiplied_as_a_parameter_would_be(packed: bool) -> None:
    # matmul takes another path, with other sums, for a matrix that wants no gradient.
    torch.manual_seed(0)
    linear = torch.nn.Linear(60, 200, bias=False)
    weight = FakeWeight(linear.weight.detach().clone(), packed)
    x = torch.randn(2, 9, 60)[:, -1:, :]
    with torch.no_grad():
        plain = functional.linear(x, linear.weight.detach())
        got = arithmetic(FakeLeases(weight)).linear(STORED, x, None)
        assert torch.equal(got, linear(x))
    if torch.equal(plain, linear(x)):
        pytest.skip("this torch sums both in the same order")


def test_fused_is_for_few_rows_and_blocked_for_more() -> None:
    weight = FakeWeight(torch.randn(5, 6), packed=True)
    fused = arithmetic(FakeLeases(weight), "fused")
    for rows in (1, compute.FUSED_ROWS, compute.FUSED_ROWS + 1):
        fused.linear(STORED, torch.randn(rows, 6), None)
    assert weight.fused_rows == [1, compute.FUSED_ROWS]
    assert weight.blocked_rows == [compute.FUSED_ROWS + 1]
    counters = fused.counters()
    assert (counters.fused_calls, counters.blocked_calls, counters.expansions) == (2, 1, 0)
    assert counters.fused_ns > 0
    assert counters.blocked_ns > 0
    assert counters.expand_ns == 0


def test_expansions_are_counted_without_their_products() -> None:
    weight = FakeWeight(torch.randn(5, 6), packed=True)
    dense = arithmetic(FakeLeases(weight))
    dense.linear(STORED, torch.randn(1, 6), None)
    counters = dense.counters()
    assert (counters.fused_calls, counters.blocked_calls, counters.expansions) == (0, 0, 1)
    assert counters.expand_ns > 0


def test_scratch_is_one_aligned_buffer_for_a_thread() -> None:
    weight = FakeWeight(torch.randn(5, 6), packed=True)
    dense = arithmetic(FakeLeases(weight))
    assert dense.scratch_bytes == 0
    for _ in range(3):
        dense.linear(STORED, torch.randn(1, 6), None)
    assert len({out.data_ptr() for out in weight.outs}) == 1
    assert weight.outs[0].data_ptr() % 64 == 0
    thread = threading.Thread(target=dense.linear, args=(STORED, torch.randn(1, 6), None))
    thread.start()
    thread.join()
    assert len({out.data_ptr() for out in weight.outs}) == 2
    weight.outs.clear()
    assert dense.scratch_bytes == 5 * 6 * 4  # the other thread's went with it


def test_scratch_of_fused_products_is_a_block() -> None:
    fused = arithmetic(FakeLeases(FakeWeight(torch.randn(5, 6), packed=True)), "fused")
    fused.linear(STORED, torch.randn(1, 6), None)
    assert fused.scratch_bytes == 0
    fused.linear(STORED, torch.randn(100, 6), None)
    assert fused.scratch_bytes == 1 * 6 * 4


def test_matrices_of_all_dtypes_share_the_scratch() -> None:
    first = FakeWeight(torch.randn(5, 6), packed=True)
    second = FakeWeight(torch.randn(4, 2).bfloat16(), packed=True)
    leases = FakeLeases(first)
    dense = arithmetic(leases)
    dense.linear(STORED, torch.randn(1, 6), None)
    leases.lease["w"] = second
    dense.linear(STORED, torch.randn(1, 2).bfloat16(), None)
    assert first.outs[0].data_ptr() == second.outs[0].data_ptr()


def test_outside_a_site_a_lease_is_taken_for_the_call() -> None:
    weight = FakeWeight(torch.randn(5, 6), packed=False)
    leases = FakeLeases(weight, inside=False)
    dense = arithmetic(leases)
    dense.linear(STORED, torch.randn(1, 6), None)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        dense.linear(STORED, torch.randn(1, 7), None)
    assert leases.log == ["enter 5", "leave 5"] * 2


def test_an_input_that_wants_a_gradient_is_refused_by_name() -> None:
    dense = arithmetic(FakeLeases(FakeWeight(torch.randn(5, 6), packed=False)))
    x = torch.randn(1, 6, requires_grad=True)
    with pytest.raises(UnsupportedOperation, match=r"w: .*torch.no_grad"):
        dense.linear(STORED, x, None)
    with torch.no_grad():
        assert not dense.linear(STORED, x, None).requires_grad
    assert not dense.linear(STORED, x.detach(), None).requires_grad


@pytest.mark.parametrize("packed", [True, False])
def test_inference_mode_may_come_and_go(packed: bool) -> None:
    with torch.inference_mode():
        weight = FakeWeight(torch.ones(5, 6), packed)
    weight.view = lambda: torch.ones(5, 6)  # type: ignore[method-assign]
    dense = arithmetic(FakeLeases(weight))
    x = torch.ones(1, 6)
    with torch.inference_mode():
        dense.linear(STORED, x, None)
    assert torch.equal(dense.linear(STORED, x, None), torch.full((1, 5), 6.0))


# --------------------------------------------------------------------------------- what is chosen

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)


def test_fused_is_the_default_where_there_are_kernels_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for device in (CPU, CUDA):
        assert Compute.chosen(None, device) is Compute.FUSED
        assert Compute.chosen("fused", device) is Compute.FUSED
        assert Compute.chosen("dense", device) is Compute.DENSE
        with pytest.raises(ValueError, match="compute 'quick' is unknown: dense, fused"):
            Compute.chosen("quick", device)
    monkeypatch.setenv("TIERD_GPU_KERNELS", "torch")
    assert Compute.chosen(None, CUDA) is Compute.DENSE
    assert Compute.chosen(None, CPU) is Compute.FUSED


def test_fused_is_refused_where_only_torch_may_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERD_GPU_KERNELS", "torch")
    with pytest.raises(UnsupportedDevice) as refused:
        Compute.chosen("fused", CUDA)
    assert str(refused.value) == (
        'compute "fused" on cuda:1 is refused: TIERD_GPU_KERNELS=torch asks for operations of '
        'torch, which only expand; unset it, or use compute="dense"'
    )


def test_it_says_which_kernels_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    leases: Any = None
    assert Arithmetic(leases, Compute.FUSED).kernels == "cpu"
    monkeypatch.setenv("TIERD_GPU_KERNELS", "torch")
    assert Arithmetic(leases, Compute.DENSE, CPU, FakeStreams()).kernels == "torch"
