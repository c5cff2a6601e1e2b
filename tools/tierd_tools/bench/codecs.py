"""How many bytes does a weight take in each codec, beside the formats of the papers and of others?

All formats hold the same matrices, bf16, with every byte of metadata counted. Each row says how its
figure came about: *measured* is the length of real output of the format's own code; *by layout* is
the published layout counted out on these matrices, tile by tile (the code is a GPU's, or only in a
paper); *formula* does not look at the matrix at all. A row is ours against theirs: how many times
larger the other format is than tierd's smallest lossless one.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tierd_layouts import exponent_packed, quantised, tiles
from tierd_tools.benchmark import Row
from tierd_tools.checkpoint import Checkpoint
from tierd_tools.pack_plan import is_prunable
from tierd_tools.prune import magnitude

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from numpy.typing import NDArray

    from tierd_layouts.packed_matrix import PackedMatrix

    Bits = NDArray[np.uint16]

MODELS = Path("../shared/models")
GAUSSIAN = (2048, 4096)
GROUP = 128
#: (matrices, zeros) -> what the issue asks of lossless, int8 and int4 against dense bf16
BOUNDS = {
    ("gaussian", 0.0): (1.38, None, None),
    ("gaussian", 0.5): (2.6, 3.0, 4.9),
    ("gaussian", 0.7): (None, None, None),
    ("trained", 0.0): (1.38, None, None),
    ("trained", 0.5): (2.55, 3.0, 4.9),
    ("trained", 0.7): (None, None, None),
}
NO_MODELS = "../shared/models is not here"


@dataclass(frozen=True, slots=True)
class Format:
    """Another format: `nbytes` of one matrix, or None where it cannot be had here."""

    name: str
    how: str
    nbytes: Callable[[Bits], int]
    missing: str | None = None


def run() -> list[Row]:
    return list(_rows())


def _rows() -> Iterator[Row]:
    normal = [gaussian()]
    learned = list(trained())
    for (kind, zeros), bounds in BOUNDS.items():
        matrices = normal if kind == "gaussian" else learned
        label = f"{kind}, {zeros:.0%} zeros"
        if not matrices:
            yield Row(label, None, None, "B/weight", not_applicable=NO_MODELS)
            continue
        pruned = [magnitude(bits, "BF16", zeros) if zeros else bits for bits in matrices]
        yield from _table(label, pruned, bounds)


def _table(
    label: str, matrices: list[Bits], bounds: tuple[float | None, float | None, float | None]
) -> Iterator[Row]:
    weights = sum(bits.size for bits in matrices)
    lossless = sum(min(_lossless_sizes(bits)) for bits in matrices) / weights
    ours = [("lossless", lossless)] + [
        (codec, sum(_quantised(bits, codec) for bits in matrices) / weights)
        for codec in ("int8", "int4")
    ]
    for (codec, size), bound in zip(ours, bounds, strict=True):
        yield Row(
            f"{label}: tierd {codec} (measured) against dense bf16",
            *(size, 2.0, "B/weight"),
            at_least=bound,
            invert=True,
        )
    for other in FORMATS:
        if other.missing is not None:
            yield Row(
                f"{label}: {other.name}", None, None, "B/weight", not_applicable=other.missing
            )
            continue
        size = sum(other.nbytes(bits) for bits in matrices) / weights
        row = f"{label}: tierd lossless against {other.name} ({other.how})"
        yield Row(row, lossless, size, "B/weight", invert=True)


# --------------------------------------------------------------------------------------------- ours


def _nbytes(matrix: PackedMatrix) -> int:
    return sum(array.nbytes for array in matrix.arrays().values())


def _lossless_sizes(bits: Bits) -> Iterable[int]:
    yield bits.nbytes
    yield sum(array.nbytes for array in tiles.encode(bits))
    for masked in (True, False):
        yield _nbytes(exponent_packed.encode(bits, "BF16", masked=masked))


def _quantised(bits: Bits, codec: str) -> int:
    return min(
        _nbytes(quantised.encode(bits, "BF16", codec=codec, group=GROUP, masked=masked))
        for masked in (True, False)
    )


# ----------------------------------------------------------------------------------------- matrices


def gaussian() -> Bits:
    """A matrix of normal weights, as an initialisation leaves them."""
    weights = np.random.default_rng(3).standard_normal(GAUSSIAN, np.float32) * np.float32(0.02)
    bits = weights.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)  # nearest even


def trained() -> Iterator[Bits]:
    """The linear layers of the trained models; nothing where they are not."""
    if not MODELS.is_dir():
        return
    for folder in sorted(path for path in MODELS.iterdir() if (path / "config.json").exists()):
        for tensor in Checkpoint.open(folder).tensors.values():
            if is_prunable(tensor) and tensor.dtype == "BF16":
                yield np.asarray(tensor.read_bits(), np.uint16)


# --------------------------------------------------------------------------------------- the others


def _kept(bits: Bits, rows: int, cols: int) -> NDArray[np.int64]:
    """Non-zeros of every `rows` x `cols` tile; edge tiles are filled up with zeros."""
    padded = np.zeros((-(-bits.shape[0] // rows) * rows, -(-bits.shape[1] // cols) * cols), bool)
    padded[: bits.shape[0], : bits.shape[1]] = bits != 0
    grid = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // cols, cols)
    counts: NDArray[np.int64] = grid.sum(axis=(1, 3), dtype=np.int64).reshape(-1)
    return counts


def _endor(bits: Bits) -> int:
    """A bit for every element and 16 for every kept one (Endor, abstract); no offsets counted."""
    return bits.size // 8 + 2 * int(np.count_nonzero(bits))


def _tiled_csl(bits: Bits) -> int:
    """32 bits a value with its place, tiles of 128 x 64 filled up to 4 (Flash-LLM, its code)."""
    items: NDArray[np.int64] = -(-_kept(bits, 128, 64) // 4) * 4
    offsets = len(items) + 2
    return 4 * (int(items.sum()) + offsets)


def _csr(bits: Bits) -> int:
    """A value and a 32-bit column for every non-zero, a 32-bit pointer for every row."""
    rows: int = bits.shape[0]
    return 6 * int(np.count_nonzero(bits)) + 4 * (rows + 1)


def _tca_bme(bits: Bits) -> int:
    """8 x 8 bitmaps; groups of 64 x 64 filled up to 8 values, with one offset and four places of
    strips each (SpInfer, its code)."""
    kept = _kept(bits, 64, 64)
    values = -(-kept // 8) * 8
    return 2 * int(values.sum()) + kept.size * (64 * 8 + 4 + 16)


def _two_of_four(bits: Bits) -> int:
    """Half of the values and two bits for each: of a matrix that was pruned to that pattern."""
    weights = bits.size
    return weights + weights // 8


def _zstd(bits: Bits) -> int:
    import zstandard

    return len(zstandard.ZstdCompressor(level=3).compress(bits.tobytes()))


def _zstd_of_raw(bits: Bits) -> int:
    import zstandard

    bitmap, _, values = tiles.encode(bits)
    compressor = zstandard.ZstdCompressor(level=3)
    return len(compressor.compress(bitmap.tobytes())) + len(compressor.compress(values.tobytes()))


def _zipnn(bits: Bits) -> int:
    import zipnn

    compressor = zipnn.ZipNN(input_format="byte", bytearray_dtype="bfloat16")
    return len(compressor.compress(bits.tobytes()))


def _unless_here(module: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


FORMATS = (
    Format("Endor's bitmap", "by layout", _endor),
    Format("Tiled-CSL", "by layout", _tiled_csl),
    Format("CSR", "by layout", _csr),
    Format("TCA-BME", "by layout", _tca_bme),
    Format("2:4, another mask", "formula", _two_of_four),
    Format("zstd -3 of the dense bytes", "measured", _zstd, _unless_here("zstandard")),
    Format("zstd -3 of bitmap and values", "measured", _zstd_of_raw, _unless_here("zstandard")),
    Format("zipnn", "measured", _zipnn, _unless_here("zipnn")),
)
