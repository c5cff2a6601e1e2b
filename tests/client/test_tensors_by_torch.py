"""Stored tensors as on a GPU, by torch operations alone: here on the CPU, marked `gpu` on CUDA."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.client.fake_streams import FakeStreams
from tests.client.test_tensors import NAMES, UP, bits
from tierd_client import Client, device_tensors, tensors
from tierd_client.compute import Arithmetic, Compute
from tierd_client.errors import TensorCorrupt, UnsupportedDevice
from tierd_client.scratch import Scratch
from tierd_kernels.faults import NO_FAULT, fault_text, new_faults

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.client.conftest import FakeDaemon, TinyPack
    from tierd_client import Lease

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of tierd_kernels read no device; they must not be called either."""
    import tierd_kernels

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a kernel of the CPU was called")

    monkeypatch.setenv("TIERD_GPU_KERNELS", "torch")
    monkeypatch.setattr(tensors, "KERNEL_DEVICES", set())
    monkeypatch.setattr(tierd_kernels, "expand", never)
    monkeypatch.setattr(tierd_kernels, "linear", never)


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.path) as client:
        yield client


def corrupt(daemon: FakeDaemon) -> None:
    """Fill the bitmap of blocks.0's first matrix, and so all its tiles with elements outside."""
    bitmap = daemon.pack.index.layer("blocks.0").tensors[0].arrays["bitmap"]
    os.pwrite(daemon.arena_fd, b"\xff" * bitmap.nbytes, daemon.slot_bytes + bitmap.offset)


@pytest.mark.parametrize(("layer", "name"), NAMES)
def test_dense_gives_back_the_bits_that_were_packed(
    client: Client, pack: TinyPack, layer: str, name: str
) -> None:
    with client.lease("tiny", layer) as lease:
        tensor = lease[name]
        np.testing.assert_array_equal(bits(tensor.dense()), pack.bits[name])
        out = torch.full(tensor.shape, 3, dtype=tensor.dtype)
        assert tensor.dense(out) is out
        np.testing.assert_array_equal(bits(out), pack.bits[name])


@pytest.mark.parametrize(("layer", "name"), NAMES)
def test_with_a_cell_the_same_bits_are_made(
    client: Client, pack: TinyPack, layer: str, name: str
) -> None:
    with client.lease("tiny", layer) as lease:
        tensor, faults = lease[name], new_faults(CPU)
        out = torch.full(tensor.shape, 3, dtype=tensor.dtype)
        device_tensors.expand(tensor, out, faults=faults)
        assert int(faults) == NO_FAULT
        np.testing.assert_array_equal(bits(out), pack.bits[name])


@pytest.mark.parametrize(("layer", "name"), [*NAMES, ("embed", "embed.weight")])
def test_linear_is_torchs_own_with_the_expanded_weight(
    client: Client, layer: str, name: str
) -> None:
    torch.manual_seed(3)
    with client.lease("tiny", layer) as lease:
        tensor = lease[name]
        rows, cols = tensor.shape
        weight = tensor.dense()
        for lead in ((), (3,), (2, 5)):
            x = torch.randn(*lead, cols).to(tensor.dtype)
            for bias in (None, torch.randn(rows).to(tensor.dtype)):
                assert torch.equal(tensor.linear(x, bias), functional.linear(x, weight, bias))
                single = functional.linear(
                    x.float(), weight.float(), None if bias is None else bias.float()
                )
                assert torch.equal(tensor.linear_f32(x, bias), single)


def test_a_blocked_product_is_refused_by_name(client: Client) -> None:
    with client.lease("tiny", "blocks.0") as lease:
        x = torch.ones(1, 100, dtype=torch.bfloat16)
        with pytest.raises(UnsupportedDevice, match=rf"blocked product of tensor '{UP}' on cpu"):
            lease[UP].blocked(x, None, Scratch())


def test_bytes_that_do_not_decode_name_model_layer_and_tensor(
    daemon: FakeDaemon, client: Client
) -> None:
    corrupt(daemon)
    x = torch.ones(1, 100, dtype=torch.bfloat16)
    with client.lease("tiny", "blocks.0") as lease:
        uses: list[Callable[[], object]]
        uses = [lease[UP].dense, lambda: lease[UP].linear(x), lambda: lease[UP].linear_f32(x)]
        text = r"^tiny/blocks\.0, 'blocks\.0\.up\.weight': tile 0: offsets do not fit"
        for use in uses:
            with pytest.raises(TensorCorrupt, match=text):
                use()


def test_with_a_cell_wrong_bytes_are_zeros_in_their_tile_and_named_there(
    daemon: FakeDaemon, client: Client
) -> None:
    corrupt(daemon)
    with client.lease("tiny", "blocks.0") as lease:
        out, faults = torch.ones(130, 100, dtype=torch.bfloat16), new_faults(CPU)
        device_tensors.expand(lease[UP], out, faults=faults)
        assert fault_text(int(faults)) == "tile 0: offsets do not fit its record"
        assert not out.any()


def test_the_length_of_an_array_that_does_not_fit_is_named_at_once(client: Client) -> None:
    with client.lease("tiny", "blocks.0") as lease:
        tensor: Any = lease[UP]
        tensor._record = replace(tensor._record, shape=(130, 200))
        with pytest.raises(TensorCorrupt, match=r"tiny/blocks\.0, .*bitmap has .* needs"):
            tensor.dense()


# ------------------------------------------------------------------------------------- arithmetic


class LeasesOf:
    """One lease that every thread is inside."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def current(self, layer: int) -> Lease:
        return self.lease

    @contextmanager
    def glimpse(self, layer: int) -> Iterator[None]:
        yield None


@pytest.mark.parametrize(("layer", "name"), [*NAMES, ("embed", "embed.weight")])
def test_the_product_of_a_model_has_the_bits_of_a_linear_in_memory(
    client: Client, layer: str, name: str
) -> None:
    torch.manual_seed(3)
    streams = FakeStreams(passed_ms=0)
    with client.lease("tiny", layer) as lease:
        leases: Any = LeasesOf(lease)
        arithmetic = Arithmetic(leases, Compute.DENSE, CPU, streams)
        tensor = lease[name]
        stored: Any = type("Stored", (), {"name": name, "layer": 0})
        rows, cols = tensor.shape
        linear = torch.nn.Linear(cols, rows, dtype=tensor.dtype)
        with torch.no_grad():
            linear.weight.copy_(tensor.dense())
            for lead in ((1,), (2, 9)):
                for x in (torch.randn(*lead, cols), torch.randn(*lead, 2, cols)[..., -1:, :]):
                    x = x.to(tensor.dtype)
                    assert torch.equal(arithmetic.linear(stored, x, linear.bias), linear(x))
        expansions = 4 if tensor.packed else 0
        assert arithmetic.counters().expansions == expansions
        assert arithmetic.counters().expand_ns == 0, "not waited for"
        streams.passed_ms = 100
        assert arithmetic.counters().expand_ns == expansions * 1_000_000
        assert (arithmetic.scratch_bytes > 0) == tensor.packed
