from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tierd_tools import bitmask
from tierd_tools.bitmask import BitmaskTensor, encode, encoded_bytes
from tierd_tools.errors import CheckpointError
from tierd_tools.source_tensor import FileTensor

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = {"BF16": "<u2", "F16": "<u2", "F32": "<u4", "F64": "<u8", "I8": "<u1"}
#: bits of NaN, infinities, the smallest and the largest numbers, and zeros of both signs
SPECIAL = {
    "<u2": [0x7FC1, 0xFF81, 0x7F80, 0xFC00, 0x7C01, 1, 0x8001, 0x8000, 0, 0, 0, 0xFFFF],
    "<u4": [0x7FC00001, 0xFF800001, 0x7F800000, 1, 0x80000001, 0x80000000, 0, 0, 0, 0xFFFFFFFF],
}


def matrices(rows: int = 40, columns: int = 40) -> st.SearchStrategy[np.ndarray[Any, Any]]:
    return st.sampled_from(sorted(SPECIAL)).flatmap(
        lambda bits: arrays.arrays(
            bits,
            st.tuples(st.integers(0, rows), st.integers(0, columns)),
            elements=st.one_of(st.sampled_from(SPECIAL[bits]), st.integers(0, np.iinfo(bits).max)),
            fill=st.just(0),
        )
    )


def reference(dense: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(bitmask, values), element by element, of bits of any number of dimensions."""
    sign = 1 << (dense.dtype.itemsize * 8 - 1)
    width = -(-dense.shape[-1] // 8)
    mask = np.zeros((*dense.shape[:-1], width), np.uint8)
    values = []
    for place in np.ndindex(dense.shape):
        if int(dense[place]) & ~sign:
            mask[(*place[:-1], place[-1] // 8)] |= 1 << place[-1] % 8
            values.append(dense[place])
    return mask, np.array(values, dense.dtype)


def tensor(
    folder: Path, dtype: str, shape: tuple[int, ...], mask: bytes, values: bytes
) -> BitmaskTensor:
    """The weight whose parts lie in files of their own, behind some bytes of others."""
    item = np.dtype(DTYPES[dtype]).itemsize
    for name, content in (("mask", mask), ("values", values)):
        (folder / name).write_bytes(b"others" + content + b"others")
    return BitmaskTensor(
        "w",
        shape,
        FileTensor(
            "w.compressed", dtype, (len(values) // item,), folder / "values", 6, len(values)
        ),
        FileTensor("w.bitmask", "U8", (len(mask),), folder / "mask", 6, len(mask)),
    )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tensors have several."""
    monkeypatch.setattr(bitmask, "_BLOCK_ELEMENTS", 64)


@pytest.mark.usefixtures("small_blocks")
def test_an_encoded_matrix_is_that_of_the_format() -> None:
    @settings(deadline=None)
    @given(dense=matrices())
    def check(dense: np.ndarray[Any, Any]) -> None:
        encoded = encode(dense)
        mask, values = reference(dense)
        assert np.array_equal(encoded.bitmask, mask)
        assert np.array_equal(encoded.values, values)
        counts = [len(reference(dense[:row])[1]) for row in range(len(dense))]
        assert encoded.row_offsets.tolist() == counts
        sign = 1 << (dense.dtype.itemsize * 8 - 1)
        assert encoded.negative_zeros == int((dense == sign).sum())
        parts = (encoded.bitmask, encoded.values, encoded.row_offsets)
        rows, columns = dense.shape
        size = encoded_bytes(rows, columns, dense.dtype.itemsize, values.size)
        assert size == sum(part.nbytes for part in parts) + 16

    check()


@pytest.mark.usefixtures("small_blocks")
def test_an_encoded_matrix_comes_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("parts")

    @settings(deadline=None)
    @given(dense=matrices(), sample=st.integers(0, 400))
    def check(dense: np.ndarray[Any, Any], sample: int) -> None:
        encoded = encode(dense)
        dtype = "F32" if dense.itemsize == 4 else "F16"
        parts = encoded.bitmask.tobytes(), encoded.values.tobytes()
        weight = tensor(folder, dtype, dense.shape, *parts)
        sign = 1 << (dense.dtype.itemsize * 8 - 1)
        expected = np.where(dense == sign, 0, dense).astype(dense.dtype)
        assert np.array_equal(weight.read_bits(), expected)
        assert weight.read().tobytes() == expected.tobytes()
        assert (weight.nbytes, weight.elements) == (dense.nbytes, dense.size)
        found = weight.sample_bits(sample)
        assert found.size == min(sample, dense.nbytes) // dense.itemsize
        if found.size:  # consecutive elements, about the middle
            flat = expected.reshape(-1)
            starts = np.arange(flat.size - found.size + 1)
            fits = [s for s in starts if np.array_equal(flat[s : s + found.size], found)]
            middle = (flat.size - found.size) / 2
            assert min(abs(start - middle) for start in fits) <= dense.shape[1]

    check()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(1,), (77,), (3, 10), (200, 7), (5, 64), (2, 3, 5), (0, 5)])
def test_any_dtype_and_number_of_dimensions_is_decoded(
    tmp_path: Path, dtype: str, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(prod(shape))
    dense = rng.integers(1, 100, shape).astype(DTYPES[dtype]) * (rng.random(shape) < 0.4)
    dense = dense.astype(DTYPES[dtype])
    mask, values = reference(dense)
    weight = tensor(tmp_path, dtype, shape, mask.tobytes(), values.tobytes())
    assert np.array_equal(weight.read_bits(), dense)
    assert weight.dtype == dtype


def test_padding_bits_are_ignored(tmp_path: Path) -> None:
    dense = np.array([[1, 0, 3], [0, 0, 6]], "<u2")
    mask, values = reference(dense)
    weight = tensor(tmp_path, "BF16", (2, 3), (mask | 0xF8).tobytes(), values.tobytes())
    assert np.array_equal(weight.read_bits(), dense)


@pytest.mark.parametrize("count", [0, 3, 5, 12])
def test_more_or_fewer_values_than_bits_are_refused_by_name(tmp_path: Path, count: int) -> None:
    dense = np.array([[1, 0, 3], [0, 0, 6], [0, 8, 0], [0, 0, 0]], "<u2")
    mask, _ = reference(dense)
    weight = tensor(tmp_path, "BF16", (4, 3), mask.tobytes(), bytes(2 * count))
    with pytest.raises(
        CheckpointError, match=rf"'w': its bitmask has 4 bits set.*'w\.compressed' has {count}"
    ):
        weight.read()


def test_the_reference_example_of_the_format_is_decoded(tmp_path: Path) -> None:
    dense = np.array([[0, 1, 0, 2, 0, 0, 0, 0, 3, 0], [0] * 10, [1] * 10], "<u2")
    values = np.array([1, 2, 3] + [1] * 10, "<u2").tobytes()
    weight = tensor(tmp_path, "BF16", (3, 10), bytes([10, 1, 0, 0, 255, 3]), values)
    assert np.array_equal(weight.read_bits(), dense)


def test_decoding_needs_little_more_memory_than_the_dense_tensor(tmp_path: Path) -> None:
    import tracemalloc

    rng = np.random.default_rng(0)
    dense = (rng.integers(1, 1 << 15, (4096, 2048)) * (rng.random((4096, 2048)) < 0.9)).astype(
        "<u2"
    )
    encoded = encode(dense)
    parts = encoded.bitmask.tobytes(), encoded.values.tobytes()
    weight = tensor(tmp_path, "BF16", dense.shape, *parts)
    tracemalloc.start()  # numpy reports its memory to it
    try:
        assert np.array_equal(weight.read_bits(), dense)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < dense.nbytes * 2  # 9 MiB of the comparison included
