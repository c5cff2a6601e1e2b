"""A small pack on disk, for the tests that read one."""

from __future__ import annotations

import shutil
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tierd_layouts import exponent_packed, packed_matrix, quantised
from tierd_layouts.container import LayerBuilder, shard_file_name, write_index, write_shard
from tierd_layouts.index import PackIndex

if TYPE_CHECKING:
    from pathlib import Path

    from tierd_layouts.packed_matrix import PackedMatrix


def sparse_bits(rows: int, cols: int, dtype: Any) -> Any:
    rng = np.random.default_rng([rows, cols])
    bits = rng.integers(1, np.iinfo(dtype).max, (rows, cols), dtype, endpoint=True)
    return bits * (rng.random((rows, cols)) < 0.5).astype(dtype)


def gaussian_bits(rows: int, cols: int, dtype: str, density: float = 1.0, seed: int = 0) -> Any:
    """Raw bits of normal weights, all but `density` of them +0, with a few of other sizes."""
    rng = np.random.default_rng([rows, cols, seed])
    weights = rng.standard_normal((rows, cols), np.float32) * np.float32(0.02)
    weights *= rng.choice(np.array([1, 1e-3, 30], np.float32), weights.shape, p=[0.98, 0.01, 0.01])
    weights[rng.random(weights.shape) >= density] = 0
    if dtype == "F16":
        return weights.astype(np.float16).view(np.uint16)
    bits = weights.view(np.uint32)
    return bits if dtype == "F32" else (bits >> 16).astype(np.uint16)


@pytest.fixture(scope="session")
def packed() -> dict[str, PackedMatrix]:
    """Matrices by name, in every new codec, dtype and form."""
    matrices = {}
    for dtype, masked in product(("BF16", "F16", "F32"), (True, False)):
        bits = gaussian_bits(70, 130, dtype, 0.5 if masked else 1.0)
        for codec in ("exponent-packed", "int8", "int4"):
            if codec == "exponent-packed":
                matrix = exponent_packed.encode(bits, dtype, masked=masked)
            else:
                matrix = quantised.encode(bits, dtype, codec=codec, group=128, masked=masked)
            matrices[f"coded.{codec}.{dtype}.{'masked' if masked else 'all'}"] = matrix
    return matrices


@pytest.fixture(scope="session")
def weights(packed: dict[str, PackedMatrix]) -> dict[str, tuple[str, Any]]:
    """Weights by name: dtype and bits. One is above 4 MiB, so that its layer has several blocks."""
    return {
        "embed.weight": ("BF16", sparse_bits(300, 70, np.uint16)),
        "embed.position": ("F32", np.arange(15, dtype=np.uint32).reshape(3, 5)),
        "layers.0.big.weight": ("BF16", sparse_bits(2000, 2100, np.uint16)),
        "layers.0.f32.weight": ("F32", sparse_bits(65, 129, np.uint32)),
        "layers.0.zero.weight": ("F16", np.zeros((65, 3), np.uint16)),
        "layers.0.full.weight": ("F16", np.full((64, 64), 0x8000, np.uint16)),
        "layers.0.empty.weight": ("BF16", np.zeros((0, 64), np.uint16)),
        "layers.0.scale": ("F32", np.array(0x3F800000, np.uint32)),
        "layers.0.norm.weight": ("BF16", np.arange(100, dtype=np.uint16)),
        "layers.0.flags": ("BOOL", np.array([1, 0, 1], np.uint8)),
        "layers.0.ids": ("I64", np.arange(4, dtype=np.uint64)),
        "layers.0.last": ("F64", np.zeros((4, 0), np.uint64)),
        "head.weight": ("BF16", sparse_bits(70, 300, np.uint16)),
        **{name: (matrix.dtype, packed_matrix.decode(matrix)) for name, matrix in packed.items()},
    }


@pytest.fixture
def pack(tmp_path: Path, pristine_pack: Path) -> Path:
    """A pack that the test may break: `embed` and `layers.0` in one shard, the rest in another."""
    return shutil.copytree(pristine_pack, tmp_path / "pack")


@pytest.fixture(scope="session")
def pristine_pack(
    tmp_path_factory: pytest.TempPathFactory,
    weights: dict[str, tuple[str, Any]],
    packed: dict[str, PackedMatrix],
) -> Path:
    builders = {name: LayerBuilder(name) for name in ("embed", "layers.0", "head", "coded")}
    for name, (dtype, bits) in weights.items():
        builder = next(b for layer, b in builders.items() if name.startswith(layer + "."))
        if name in packed:
            builder.add_matrix(name, packed[name])
        elif bits.ndim == 2 and dtype in ("BF16", "F16", "F32") and name != "embed.position":
            builder.add_raw(name, dtype, bits)
        else:
            builder.add_dense(name, dtype, bits.shape, bits)
    encoded = [builder.finish() for builder in builders.values()]
    folder = tmp_path_factory.mktemp("pristine")
    first, layers = write_shard(folder / shard_file_name(0), 0, encoded[:2])
    second, more = write_shard(folder / shard_file_name(1), 1, encoded[2:])
    index = PackIndex(
        version=1,
        tool="test",
        source_digest="",
        shards=(first, second),
        layers=(*layers, *more),
    )
    write_index(folder, index)
    return folder
