from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tierd_layouts import exponent_packed, packed_matrix
from tierd_layouts.packed_matrix import PackedMatrix
from tierd_layouts.tile_grid import TileGrid
from tierd_tools import pack_encode, pack_tensor
from tierd_tools.errors import PackError
from tierd_tools.pack_encode import EXPONENT_DENSE, EXPONENT_MASKED, RAW
from tierd_tools.pack_plan import PlannedTensor
from tierd_tools.pack_tensor import EncodedTensor, TensorEncoder
from tierd_tools.prune import magnitude
from tierd_tools.wanda import wanda

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "model.layers.0.up.weight"
TYPES = {"bitmap": np.uint64, "offsets": np.uint32, "heads": np.uint32, "scales": np.uint16}


@dataclasses.dataclass
class Source:
    """A tensor that is read from memory."""

    bits: np.ndarray
    dtype: str = "BF16"
    name: str = NAME

    @property
    def shape(self) -> tuple[int, ...]:
        return self.bits.shape

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes

    @property
    def elements(self) -> int:
        return self.bits.size

    def read(self) -> np.ndarray:
        return self.bits.copy().reshape(-1).view(np.uint8)

    def read_bits(self) -> np.ndarray:
        return self.bits.copy()

    def sample_bits(self, nbytes: int) -> np.ndarray:
        return self.bits.reshape(-1)[: nbytes // self.bits.itemsize].copy()


@pytest.fixture
def bands() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


def normal(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, 0.02, (rows, cols)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def encode(
    source: Source,
    codec: str,
    bands: ThreadPoolExecutor,
    *,
    sparsity: float = 0.0,
    prune: str = "magnitude",
    norms: Any = None,
) -> EncodedTensor:
    encoder = TensorEncoder(prune, 128, norms or {}, bands)
    return encoder.encode(PlannedTensor(source, codec, sparsity))


def matrix_of(encoded: EncodedTensor) -> PackedMatrix:
    arrays: dict[str, Any] = {
        name: np.frombuffer(b"".join(pieces), TYPES.get(name, np.uint8))
        for name, pieces in encoded.arrays.items()
    }
    if encoded.codec == "raw":
        arrays["values"] = arrays["values"].view(np.uint32 if encoded.dtype == "F32" else "<u2")
    rows, cols = encoded.shape
    arrays.setdefault("bitmap", None)
    return PackedMatrix(
        encoded.codec, encoded.dtype, rows, cols, group=encoded.group or 0, **arrays
    )


def decoded(encoded: EncodedTensor) -> np.ndarray:
    if encoded.codec == "dense":
        (piece,) = encoded.arrays["data"]
        return np.frombuffer(piece, "<u2").reshape(encoded.shape)
    matrix = matrix_of(encoded)
    packed_matrix.validate(matrix, encoded.nnz)
    return packed_matrix.decode(matrix)


@pytest.mark.parametrize("shape", [(64, 64), (65, 3), (1000, 200), (640, 65), (1, 129)])
@pytest.mark.parametrize("codec", ["lossless", "raw", "int8", "int4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_bands_together_are_the_arrays_of_the_whole_matrix(
    shape: tuple[int, int],
    codec: str,
    sparsity: float,
    bands: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bits = normal(*shape)
    whole = encode(Source(bits), codec, bands, sparsity=sparsity)
    monkeypatch.setattr(pack_tensor, "BAND_BYTES", 128 * shape[1] * 2)
    banded = encode(Source(bits), codec, bands, sparsity=sparsity)
    assert (banded.codec, banded.nnz, banded.group) == (whole.codec, whole.nnz, whole.group)
    assert list(banded.arrays) == list(whole.arrays)
    for name, pieces in whole.arrays.items():
        assert b"".join(banded.arrays[name]) == b"".join(pieces), name
    expected = magnitude(bits, "BF16", sparsity)
    if codec in ("lossless", "raw"):
        assert np.array_equal(decoded(banded), expected)
    else:
        assert decoded(banded).shape == shape
        assert not decoded(banded)[expected == 0].any()


@pytest.mark.parametrize("zeros", [0.0, 0.03, 0.2, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("content", ["normal", "random"])
def test_lossless_takes_the_smallest_form_with_every_array_counted(
    zeros: float, content: str, bands: ThreadPoolExecutor
) -> None:
    rng = np.random.default_rng(1)
    bits = normal(320, 130) if content == "normal" else rng.integers(1, 65536, (320, 130), "u2")
    bits[rng.random(bits.shape) < zeros] = 0

    def stored(matrix: PackedMatrix) -> int:
        return sum(-(-array.nbytes // 256) * 256 for array in matrix.arrays().values())

    forms = {
        "dense": -(-bits.nbytes // 256) * 256,
        RAW: stored(packed_matrix.encode_raw(bits, "BF16")),
        EXPONENT_MASKED: stored(exponent_packed.encode(bits, "BF16", masked=True)),
        EXPONENT_DENSE: stored(exponent_packed.encode(bits, "BF16", masked=False)),
    }
    encoded = encode(Source(bits), "lossless", bands)
    found = sum(-(-sum(p.nbytes for p in x) // 256) * 256 for x in encoded.arrays.values())
    assert found == min(forms.values())
    assert np.array_equal(decoded(encoded), bits)
    sizes = pack_encode.values_bytes(bits, "BF16")
    grid = TileGrid(*bits.shape)
    for form in pack_encode.LOSSLESS:
        assert pack_encode.stored_bytes(form, grid, sizes[form]) == forms[form]


def test_quantised_matrices_are_masked_where_zeros_are_many(bands: ThreadPoolExecutor) -> None:
    for codec in ("int8", "int4"):
        full = encode(Source(normal(128, 256)), codec, bands)
        half = encode(Source(normal(128, 256)), codec, bands, sparsity=0.5)
        assert (full.codec, half.codec) == (codec, codec)
        assert "bitmap" not in full.arrays
        assert full.nnz == 128 * 256
        assert "bitmap" in half.arrays
        assert half.nnz <= 128 * 128
        assert (full.group, half.group) == (128, 128)


def test_a_tensor_that_is_not_finite_is_stored_without_loss_and_reported(
    bands: ThreadPoolExecutor,
) -> None:
    for special in (0x7F80, 0xFF80, 0x7FC1):
        bits = normal(256, 64)
        bits[200, 3] = special
        encoded = encode(Source(bits), "int4", bands, sparsity=0.5)
        assert encoded.not_finite
        assert encoded.codec == "exponent-packed"
        assert np.array_equal(decoded(encoded), magnitude(bits, "BF16", 0.5))
    assert not encode(Source(normal(256, 64)), "int4", bands).not_finite


def test_a_matrix_too_small_to_be_worth_a_loss_is_stored_without_one(
    bands: ThreadPoolExecutor,
) -> None:
    bits = normal(2, 2)
    encoded = encode(Source(bits), "int8", bands)
    assert encoded.codec == "dense"
    assert np.array_equal(decoded(encoded), bits)


def two_of_four(rows: int, cols: int) -> np.ndarray:
    bits = normal(rows, cols) | np.uint16(1)
    bits.reshape(-1, 4)[:, ::2] = 0
    return bits


def test_a_matrix_that_is_pruned_already_is_left_as_it_is(bands: ThreadPoolExecutor) -> None:
    half = magnitude(normal(128, 128), "BF16", 0.495)
    for bits, sparsity, left in (
        (half, 0.5, True),
        (half, 0.52, False),
        (two_of_four(128, 128), 0.5, True),
        (two_of_four(128, 128), 0.7, True),
        (normal(128, 128), 0.5, False),
    ):
        encoded = encode(Source(bits), "lossless", bands, sparsity=sparsity)
        assert (encoded.left, encoded.pruned) == (left, not left)
        expected = bits if left else magnitude(bits, "BF16", sparsity)
        assert np.array_equal(decoded(encoded), expected)


def test_wanda_prunes_each_row_by_its_norms(
    bands: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_tensor, "BAND_BYTES", 1)
    bits = normal(200, 96)
    norms = np.random.default_rng(3).uniform(0, 2, 96).astype(np.float32)
    encoded = encode(
        Source(bits), "lossless", bands, sparsity=0.6, prune="wanda", norms={NAME: norms}
    )
    assert np.array_equal(decoded(encoded), wanda(bits, "BF16", norms, 0.6))
    with pytest.raises(PackError, match=f"no norms for tensor '{NAME}'"):
        encode(Source(bits), "lossless", bands, sparsity=0.6, prune="wanda")


def test_the_digest_is_of_the_source_and_not_of_what_is_left(bands: ThreadPoolExecutor) -> None:
    bits = normal(64, 64)
    pruned = encode(Source(bits), "int4", bands, sparsity=0.9)
    assert pruned.source_digest == encode(Source(bits), "dense", bands).source_digest


@pytest.mark.parametrize("shape", [(), (0,), (0, 5), (5, 0), (3,), (2, 2, 2)])
def test_a_dense_tensor_of_any_shape_is_its_bytes(
    shape: tuple[int, ...], bands: ThreadPoolExecutor
) -> None:
    bits = np.arange(int(np.prod(shape)), dtype=np.uint16).reshape(shape)
    codec = "lossless" if len(shape) == 2 else "dense"
    encoded = encode(Source(bits), codec, bands)
    assert encoded.codec == "dense"
    assert b"".join(encoded.arrays["data"]) == bits.tobytes()


def test_what_is_given_back_is_whole_pages_inside_the_array() -> None:
    data = np.full(10 * 4096, 7, np.uint8)
    begin = -data.ctypes.data % 4096
    part = data[begin + 100 : begin + 3 * 4096 + 50]
    pack_tensor._give_back(part)
    assert (data[: begin + 4096] == 7).all()
    assert (data[begin + 3 * 4096 :] == 7).all()
    pack_tensor._give_back(data[:0])
