from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.client.conftest import CODED
from tierd_client import Client
from tierd_client.errors import BadTensorArgument, PackedView, TensorCorrupt
from tierd_client.scratch import Scratch
from tierd_client.tensors import TORCH_NAMES, torch_dtype
from tierd_layouts.dtypes import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.client.conftest import FakeDaemon, TinyPack
    from tierd_client import Lease, PackedTensor

PACKED = {
    "blocks.0": ["blocks.0.up.weight", "blocks.0.down.weight"],
    "odd": ["odd.half", "odd.single", "odd.bfloat", *CODED],
}
NAMES = [(layer, name) for layer, names in PACKED.items() for name in names]
UP = "blocks.0.up.weight"


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    with Client(daemon.path) as client:
        yield client


@pytest.fixture
def block(client: Client) -> Iterator[Lease]:
    with client.lease("tiny", "blocks.0") as lease:
        yield lease


def bits(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    unsigned = torch.uint16 if tensor.itemsize == 2 else torch.uint32
    array: np.ndarray[Any, Any] = tensor.contiguous().view(unsigned).numpy()
    return array


def test_every_element_type_of_a_pack_has_a_torch_type_of_its_size() -> None:
    assert TORCH_NAMES.keys() == ITEM_BYTES.keys()
    for name, nbytes in ITEM_BYTES.items():
        assert torch_dtype(name).itemsize == nbytes


# ------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize(("layer", "name"), NAMES)
def test_dense_gives_back_the_bits_that_were_packed(
    client: Client, pack: TinyPack, layer: str, name: str
) -> None:
    with client.lease("tiny", layer) as lease:
        tensor = lease[name]
        dense = tensor.dense()
        assert (tuple(dense.shape), dense.dtype) == (tensor.shape, tensor.dtype)
        np.testing.assert_array_equal(bits(dense), pack.bits[name])
        out = torch.full(tensor.shape, 3, dtype=tensor.dtype)
        assert tensor.dense(out) is out
        np.testing.assert_array_equal(bits(out), pack.bits[name])


def test_dense_is_private_memory(client: Client) -> None:
    with client.lease("tiny", "blocks.0") as lease:
        for name in (UP, "blocks.0.norm.weight"):
            lease[name].dense().fill_(7)
            assert not torch.all(lease[name].dense() == 7)
        kept = lease["blocks.0.norm.weight"].dense()
    assert kept.shape == (100,)


def test_a_dense_stored_tensor_is_the_same_bits_in_every_form(
    client: Client, pack: TinyPack
) -> None:
    with client.lease("tiny", "embed") as lease:
        tensor = lease["embed.weight"]
        assert not tensor.packed
        expected = pack.bits["embed.weight"]
        np.testing.assert_array_equal(bits(tensor.dense()), expected)
        np.testing.assert_array_equal(bits(tensor.view()), expected)
        np.testing.assert_array_equal(bits(tensor.unchecked_view()), expected)
        assert tensor.view().data_ptr() == tensor.unchecked_view().data_ptr()
        assert tensor.view().stride() == tensor.unchecked_view().stride() == (100, 1)


def test_a_tensor_without_elements_has_all_its_forms(client: Client) -> None:
    with client.lease("tiny", "odd") as lease:
        nothing = lease["odd.nothing"]
        assert nothing.view().shape == nothing.dense().shape == (0, 4)
        assert nothing.linear(torch.ones(2, 4, dtype=torch.bfloat16)).shape == (2, 0)


@pytest.mark.parametrize(
    ("out", "text"),
    [
        (lambda: torch.empty(130, 100), "out is torch.float32, tensor '.*' is torch.bfloat16"),
        (
            lambda: torch.empty(100, 130, dtype=torch.bfloat16),
            r"shape \[100, 130\], .*\[130, 100\]",
        ),
        (lambda: torch.empty(100, 130, dtype=torch.bfloat16).t(), r"strides \[1, 130\]"),
        (lambda: torch.empty(130, 100, dtype=torch.bfloat16, device="meta"), "out is on meta"),
    ],
    ids=["dtype", "shape", "strides", "device"],
)
def test_dense_refuses_an_out_that_does_not_fit_by_name(block: Lease, out: Any, text: str) -> None:
    with pytest.raises(BadTensorArgument, match=text):
        block[UP].dense(out())


def test_a_view_of_a_packed_tensor_is_refused_by_name(block: Lease) -> None:
    with pytest.raises(PackedView, match=r"'blocks\.0\.up\.weight' is stored with codec 'raw'"):
        block[UP].view()


# ------------------------------------------------------------------------------------------ linear


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())


def unrounded(tensor: PackedTensor, pack: TinyPack) -> torch.Tensor:
    """The weights in float64; of a lossy codec as they are before the rounding to the dtype."""
    found = pack.unrounded.get(tensor.name)
    return tensor.dense().double() if found is None else torch.from_numpy(found).double()


@pytest.mark.parametrize(("layer", "name"), NAMES)
def test_linear_is_close_to_the_float64_product_for_any_leading_dimensions(
    client: Client, pack: TinyPack, layer: str, name: str
) -> None:
    torch.manual_seed(3)
    with client.lease("tiny", layer) as lease:
        tensor = lease[name]
        rows, cols = tensor.shape
        weight = unrounded(tensor, pack)
        for lead in ((), (1,), (3,), (2, 5)):
            x = torch.randn(*lead, cols).to(tensor.dtype)
            for bias in (None, torch.randn(rows).to(tensor.dtype)):
                exact = x.double() @ weight.t()
                if bias is not None:
                    exact = exact + bias.double()
                single = tensor.linear_f32(x, bias)
                assert (single.shape, single.dtype) == ((*lead, rows), torch.float32)
                assert relative_error(single, exact) <= 1e-5
                rounded = tensor.linear(x, bias)
                assert torch.equal(rounded, single.to(tensor.dtype))  # rounded once


@pytest.mark.parametrize(("layer", "name"), NAMES)
def test_a_blocked_product_errs_as_little_as_torchs_own_with_the_dense_weight(
    client: Client, layer: str, name: str
) -> None:
    torch.manual_seed(5)
    with client.lease("tiny", layer) as lease:
        tensor = lease[name]
        rows, cols = tensor.shape
        x, weight = torch.randn(4, 10, cols).to(tensor.dtype), tensor.dense()
        for bias in (None, torch.randn(rows).to(tensor.dtype)):
            exact = x.double() @ weight.double().t()
            if bias is not None:
                exact = exact + bias.double()
            got = tensor.blocked(x, bias, Scratch())
            assert (got.shape, got.dtype) == ((4, 10, rows), tensor.dtype)
            assert got.is_contiguous()
            theirs = relative_error(torch.nn.functional.linear(x, weight, bias), exact)
            assert relative_error(got, exact) <= 1.05 * theirs


def test_linear_takes_a_transposed_x_and_no_tokens(block: Lease) -> None:
    tensor = block[UP]
    x = torch.randn(100, 4).to(torch.bfloat16)
    assert torch.equal(tensor.linear(x.t()), tensor.linear(x.t().contiguous()))
    assert tensor.linear(torch.empty(0, 100, dtype=torch.bfloat16)).shape == (0, 130)
    assert tensor.linear(torch.empty(2, 0, 100, dtype=torch.bfloat16)).shape == (2, 0, 130)


def test_linear_of_a_dense_stored_tensor_is_torchs_own(client: Client) -> None:
    with client.lease("tiny", "embed") as lease:
        tensor = lease["embed.weight"]
        x, bias = torch.randn(3, 100).to(torch.bfloat16), torch.randn(50).to(torch.bfloat16)
        weight = tensor.dense()
        functional = torch.nn.functional.linear
        assert torch.equal(tensor.linear(x), functional(x, weight))
        assert torch.equal(tensor.linear(x, bias), functional(x, weight, bias))
        single = functional(x.float(), weight.float(), bias.float())
        assert torch.equal(tensor.linear_f32(x, bias), single)


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (lambda: torch.ones(2, 100), "x is torch.float32, tensor '.*' is torch.bfloat16"),
        (
            lambda: torch.ones(2, 99, dtype=torch.bfloat16),
            r"shape \[2, 99\], .* takes \[\.\.\., 100",
        ),
        (lambda: torch.ones((), dtype=torch.bfloat16), r"shape \[\]"),
        (lambda: torch.ones(2, 100, dtype=torch.bfloat16, device="meta"), "x is on meta"),
        (
            lambda: torch.ones(2, 100, dtype=torch.bfloat16, requires_grad=True),
            "x requires a gradient",
        ),
    ],
    ids=["dtype", "shape", "scalar", "device", "gradient"],
)
def test_linear_refuses_an_x_that_does_not_fit_by_name(block: Lease, x: Any, text: str) -> None:
    for method in (block[UP].linear, block[UP].linear_f32):
        with pytest.raises(BadTensorArgument, match=text):
            method(x())


def test_linear_takes_an_x_with_a_gradient_where_none_is_recorded(block: Lease) -> None:
    with torch.no_grad():
        y = block[UP].linear(torch.ones(2, 100, dtype=torch.bfloat16, requires_grad=True))
    assert not y.requires_grad


def test_linear_refuses_a_bias_of_another_length_and_a_tensor_that_is_no_matrix(
    block: Lease,
) -> None:
    x = torch.ones(2, 100, dtype=torch.bfloat16)
    with pytest.raises(BadTensorArgument, match=r"bias of .* has shape \[100\], expected \[130\]"):
        block[UP].linear(x, torch.ones(100))
    with pytest.raises(BadTensorArgument, match=r"linear needs a matrix.* shape \[100\]"):
        block["blocks.0.norm.weight"].linear(x)


def test_bytes_that_do_not_decode_name_model_layer_and_tensor(
    daemon: FakeDaemon, client: Client
) -> None:
    record = daemon.pack.index.layer("blocks.0").tensors[0]
    bitmap = record.arrays["bitmap"]
    os.pwrite(daemon.arena_fd, b"\xff" * bitmap.nbytes, daemon.slot_bytes + bitmap.offset)
    x = torch.ones(1, 100, dtype=torch.bfloat16)
    with client.lease("tiny", "blocks.0") as lease:
        uses: list[Callable[[], object]]
        uses = [lease[UP].dense, lambda: lease[UP].linear(x), lambda: lease[UP].linear_f32(x)]
        uses.append(lambda: lease[UP].blocked(x, None, Scratch()))
        for use in uses:
            with pytest.raises(TensorCorrupt, match=r"tiny/blocks\.0, 'blocks\.0\.up\.weight'"):
                use()
