from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.client.conftest import MODEL
from tierd_client import Client
from tierd_kernels import torch_matrix
from tierd_kernels.torch_expand import expand

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.client.conftest import FakeDaemon, TinyPack
    from tierd_client.opened import OpenedModel
    from tierd_layouts.index import Layer, Tensor

NAME = "odd.exponent"


@pytest.fixture
def opened(daemon: FakeDaemon) -> Iterator[OpenedModel]:
    with Client(daemon.path) as client:
        opened = client.open(MODEL)
        with opened.acquire(3):
            yield opened


def place(opened: OpenedModel) -> tuple[Layer, Tensor, int]:
    layer = opened.index.layer("odd")
    record = next(tensor for tensor in layer.tensors if tensor.name == NAME)
    return layer, record, 3 * (2 << 20)


def test_arrays_are_made_once_for_a_place(opened: OpenedModel) -> None:
    layer, record, offset = place(opened)
    matrices = opened.matrices
    for make in (matrices.packed, matrices.torch):
        first = make(layer, record, offset)
        assert make(layer, record, offset) is first
        elsewhere = make(layer, record, offset - 4096)
        assert elsewhere is not first
        assert make(layer, record, offset - 4096) is elsewhere


def test_torch_sees_the_arena_itself(opened: OpenedModel, pack: TinyPack) -> None:
    layer, record, offset = place(opened)
    matrix = opened.matrices.torch(layer, record, offset)
    begin = opened.mapping.tensor(torch.uint8, (1,), (1,), offset).data_ptr()
    assert matrix.values.data_ptr() == begin + record.arrays["values"].offset
    out = torch.empty(record.shape, dtype=torch.bfloat16)
    expand(matrix, out)
    np.testing.assert_array_equal(out.view(torch.uint16).numpy(), pack.bits[NAME])


def test_heads_are_measured_once_for_a_tensor_not_for_a_place(
    opened: OpenedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, record, offset = place(opened)
    first = opened.matrices.torch(layer, record, offset)
    assert (first.most_planes, first.most_escapes) < (8, 4096)

    def never(matrix: object) -> None:
        raise AssertionError("measured again, which waits for a GPU")

    monkeypatch.setattr(torch_matrix, "measured", never)
    moved = opened.matrices.torch(layer, record, offset - 4096)
    assert (moved.most_planes, moved.most_escapes) == (first.most_planes, first.most_escapes)


def test_arrays_made_in_inference_mode_serve_outside_too(opened: OpenedModel) -> None:
    with torch.inference_mode():
        matrix = opened.matrices.torch(*place(opened))
    assert not matrix.values.is_inference()
