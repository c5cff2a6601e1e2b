"""One tensor of a checkpoint to the arrays of a pack: read, pruned, and encoded in bands.

A band is some tile rows, about 8 MiB of the source. Bands are encoded side by side, and the memory
of a band's source goes back to the system when it is encoded, so that a tensor takes little more
memory than its source, whatever it is encoded to.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import xxhash

from tierd_kernels import encode as native
from tierd_layouts.codecs import LEVEL_LIMITS
from tierd_layouts.dtypes import ITEM_BYTES
from tierd_layouts.runs import MAX_RUN_UNITS, RUN_ALIGNMENT, values_bytes
from tierd_layouts.tile_grid import TILE, TileGrid
from tierd_tools import pack_encode
from tierd_tools.errors import PackError
from tierd_tools.prune import is_pruned

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from tierd_layouts.packed_matrix import PackedMatrix
    from tierd_layouts.tile_grid import BitsArray
    from tierd_tools.pack_encode import Form
    from tierd_tools.pack_plan import PlannedTensor

BAND_BYTES = 8 << 20

T = TypeVar("T")
Norms = Mapping[str, "NDArray[np.float32]"]


@dataclass(slots=True)
class EncodedTensor:
    """A tensor as it is stored; `arrays` holds the pieces of each array, in stored order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    nnz: int
    group: int | None
    source_bytes: int
    source_digest: str  #: xxh3_128 of the source's bytes, before pruning
    arrays: dict[str, list[memoryview]] = field(default_factory=dict)
    pruned: bool = False
    left: bool = False  #: was to be pruned, but is sparse enough already
    not_finite: bool = False  #: was to be quantised, but cannot be: stored without loss

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for pieces in self.arrays.values() for piece in pieces)


class TensorEncoder:
    """Encodes tensors as planned. Used by several threads at once.

    prune: how, for tensors that have a sparsity; group: of int8 and int4; norms: for Wanda;
    bands: runs the bands of a tensor side by side, and must not be the executor of the caller.
    """

    def __init__(self, prune: str, group: int, norms: Norms, bands: Executor) -> None:
        self._prune = prune
        self._group = group
        self._norms = norms
        self._bands = bands

    def encode(self, planned: PlannedTensor) -> EncodedTensor:
        """Raises CheckpointError from the source, PackError for what the calibration lacks."""
        source = planned.source
        data = source.read()
        encoded = EncodedTensor(
            name=source.name,
            dtype=source.dtype,
            shape=source.shape,
            codec="dense",
            nnz=source.elements,
            group=None,
            source_bytes=source.nbytes,
            source_digest=xxhash.xxh3_128_hexdigest(data.data),
        )
        if planned.codec != "dense" and data.size:
            bits = data.view(f"<u{ITEM_BYTES[source.dtype]}").reshape(source.shape)
            if planned.sparsity:
                encoded.left = is_pruned(bits, planned.sparsity)
                encoded.pruned = not encoded.left
            if encoded.pruned:
                self._prune_bits(bits, planned)
            form = self._form(bits, planned, encoded)
            if form is not None:
                self._encode_bands(bits, form, encoded)
                return encoded
        encoded.arrays["data"] = [data.data if data.size else memoryview(b"")]
        return encoded

    def _prune_bits(self, bits: BitsArray, planned: PlannedTensor) -> None:
        """In place."""
        name, dtype = planned.source.name, planned.source.dtype
        if self._prune == "magnitude":
            native.prune_magnitude(bits, dtype, planned.sparsity)
            return
        from tierd_tools.wanda import wanda

        norms = self._norms.get(name)
        if norms is None:
            raise PackError(f"the calibration has no norms for tensor {name!r}")

        def prune(band: BitsArray) -> None:
            band[...] = wanda(band, dtype, norms, planned.sparsity)

        self._each_band(prune, bits)

    def _form(self, bits: BitsArray, planned: PlannedTensor, encoded: EncodedTensor) -> Form | None:
        """The form to store a matrix in; None: dense."""
        dtype = planned.source.dtype
        grid = TileGrid(*bits.shape)
        dense = pack_encode.aligned(planned.source.nbytes)
        if planned.codec in LEVEL_LIMITS:
            if all(self._each_band(lambda band: pack_encode.all_finite(band, dtype), bits)):
                form, nbytes = self._quantised_form(bits, dtype, planned.codec, grid)
                if nbytes < dense:
                    return form
            else:
                encoded.not_finite = True
        forms = pack_encode.forms_of("raw" if planned.codec == "raw" else "lossless")
        found = self._each_band(lambda band: pack_encode.values_bytes(band, dtype), bits)
        values = {form: sum(band[form] for band in found) for form in forms}
        sizes = {
            form: pack_encode.stored_bytes(form, grid, nbytes)
            for form, nbytes in values.items()
            if nbytes <= MAX_RUN_UNITS * RUN_ALIGNMENT
        }
        best = min(sizes, key=lambda form: sizes[form], default=None)
        return best if best is not None and sizes[best] < dense else None

    def _quantised_form(
        self, bits: BitsArray, dtype: str, codec: str, grid: TileGrid
    ) -> tuple[Form, int]:
        """Masked or dense form, as is smaller for the band in the middle; about its bytes."""
        bands = _bands(bits)
        middle = bands[len(bands) // 2]
        part = TileGrid(*middle.shape)
        sizes: dict[Form, int] = {}
        for form in pack_encode.forms_of(codec):
            values = pack_encode.encode(middle, dtype, form, self._group).values.nbytes
            sizes[form] = pack_encode.stored_bytes(form, part, values, self._group)
        best = min(sizes, key=lambda form: sizes[form])
        return best, sizes[best] * grid.tiles // part.tiles

    def _encode_bands(self, bits: BitsArray, form: Form, encoded: EncodedTensor) -> None:
        group = self._group if form.codec in LEVEL_LIMITS else 0

        def encode(band: BitsArray) -> PackedMatrix:
            matrix = pack_encode.encode(band, encoded.dtype, form, group)
            _give_back(band)
            return matrix

        matrices = self._each_band(encode, bits)
        encoded.codec = form.codec
        encoded.group = group or None
        encoded.nnz = sum(matrix.nnz for matrix in matrices)
        for name in matrices[0].arrays():
            parts = [matrix.arrays()[name] for matrix in matrices]
            if name == "offsets":
                parts = [_joined_offsets(parts)]
            encoded.arrays[name] = [part.data.cast("B") for part in parts if part.size]

    def _each_band(self, work: Callable[[Any], T], bits: BitsArray) -> list[T]:
        bands = _bands(bits)
        if len(bands) == 1:
            return [work(bands[0])]
        return list(self._bands.map(work, bands))


def _bands(bits: BitsArray) -> list[BitsArray]:
    """Whole tile rows each."""
    rows, cols = bits.shape
    height = max(1, BAND_BYTES // (cols * bits.itemsize * TILE)) * TILE
    return [bits[begin : begin + height] for begin in range(0, rows, height)]


def _joined_offsets(parts: list[NDArray[Any]]) -> NDArray[np.uint32]:
    """Raises BadMatrix: more bytes than they can address."""
    base = 0
    joined: list[NDArray[Any]] = [np.zeros(1, np.uint32)]
    for offsets in parts:
        values_bytes(base + int(offsets[-1]))
        joined.append(offsets[1:] + np.uint32(base))
        base += int(offsets[-1])
    return np.concatenate(joined)


_libc = ctypes.CDLL(None, use_errno=True)
_MADV_DONTNEED = 4


def _give_back(array: NDArray[Any]) -> None:
    """Returns the whole pages under `array` to the system; its content is lost."""
    begin = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (array.ctypes.data + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        # Advice: where it is not taken the memory is free a little later.
        _libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
