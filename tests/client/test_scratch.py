from __future__ import annotations

from typing import Any

import pytest
import torch

from tierd_client.scratch import ALIGNMENT, Scratch


def test_the_same_memory_serves_every_shape_and_dtype() -> None:
    scratch = Scratch()
    large = scratch.matrix((7, 5), torch.float32)
    small = scratch.matrix((3, 4), torch.bfloat16)
    assert large.data_ptr() == small.data_ptr()
    assert large.data_ptr() % ALIGNMENT == 0
    assert (tuple(small.shape), small.dtype) == ((3, 4), torch.bfloat16)
    assert scratch.matrix((7, 5), torch.float32) is large
    assert scratch.nbytes == 7 * 5 * 4


def test_it_grows_to_the_largest_matrix_and_keeps_no_older_buffer() -> None:
    scratch = Scratch()
    assert scratch.nbytes == 0
    for rows in (3, 1000, 2):
        matrix = scratch.matrix((rows, 8), torch.float16)
        assert matrix.shape == (rows, 8)
        assert matrix.data_ptr() % ALIGNMENT == 0
    assert scratch.nbytes == 1000 * 8 * 2
    again = scratch.matrix((3, 8), torch.float16)
    assert again.data_ptr() == matrix.data_ptr(), "laid over the buffer that grew"


def test_a_matrix_without_elements_is_one() -> None:
    assert Scratch().matrix((0, 4), torch.bfloat16).shape == (0, 4)


def test_it_looks_like_a_parameter_and_outlives_inference_mode() -> None:
    with torch.inference_mode():
        matrix = Scratch().matrix((2, 2), torch.float32)
    assert matrix.requires_grad
    assert matrix.is_leaf
    assert not matrix.is_inference()


def test_it_may_grow_before_anybody_asks() -> None:
    scratch = Scratch()
    with torch.inference_mode():
        scratch.reserve(1000)
    scratch.reserve(10)
    assert scratch.nbytes == 1000
    matrix = scratch.matrix((3, 4), torch.float32)
    assert (scratch.nbytes, matrix.is_inference()) == (1000, False)


def test_a_failure_to_grow_leaves_it_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = Scratch()
    scratch.matrix((4, 4), torch.float32)
    make = torch.empty

    def full(nbytes: int, **how: Any) -> torch.Tensor:
        if nbytes > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(nbytes, **how)

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError):
        scratch.matrix((400, 4), torch.float32)
    assert scratch.nbytes == 0
    assert scratch.matrix((3, 4), torch.float32).shape == (3, 4)
