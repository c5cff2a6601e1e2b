from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd_tools import pack_plan
from tierd_tools.checkpoint import Checkpoint
from tierd_tools.pack import pack
from tierd_tools.prune import is_pruned, magnitude
from tierd_tools.unpack import unpack
from tierd_tools.verify import verify

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1}
#: raw patterns that a float comparison would lose: zeros of both signs, NaN payloads, infinity
SPECIAL = {
    2: [0, 0x8000, 0x7FC1, 0xFFFF, 0x7F80, 0x7C01, 0x0001],
    4: [0, 0x80000000, 0x7FC00001, 0xFFFFFFFF, 0x7F800000, 1],
}


@st.composite
def weights(draw: st.DrawFn) -> tuple[str, tuple[int, ...], bytes]:
    dtype = draw(st.sampled_from(["BF16", "F16", "F32", "F64", "I64", "U8"]))
    sizes = st.sampled_from([0, 1, 2, 63, 64, 65, 130])
    shape = tuple(draw(st.lists(sizes, max_size=3)))
    if math.prod(shape) > 20_000:
        shape = shape[:2]
    item = ITEM_BYTES[dtype]
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    data = rng.integers(0, 256, math.prod(shape) * item, np.uint8)
    if item in SPECIAL:
        bits = data.view(f"<u{item}")
        zeros = draw(st.sampled_from([0.0, 0.1, 0.5, 0.97, 1.0]))
        bits[rng.random(bits.size) < 0.05] = rng.choice(SPECIAL[item])
        bits[rng.random(bits.size) < zeros] = 0
    return dtype, shape, data.tobytes()


NAMES = st.sampled_from(
    [
        *("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "alone"),
        *(f"model.layers.{i}.{n}" for i in (0, 1, 10) for n in ("a.weight", "b.bias", "c")),
    ]
)


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.dictionaries(NAMES, weights(), min_size=1, max_size=6),
    tied=st.booleans(),
    shards=st.integers(1, 3),
    codec=st.sampled_from(["lossless", "raw"]),
)
def test_unpacking_a_pack_gives_back_every_byte(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: Any,
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]],
    tied: bool,
    shards: int,
    codec: str,
) -> None:
    tmp_path = tmp_path_factory.mktemp("roundtrip")
    if tied and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    source = checkpoints.write(tmp_path / "source", tensors, shards=min(shards, len(tensors)))
    pack(source, tmp_path / "pack", codec=codec)
    verify(tmp_path / "pack")
    unpack(tmp_path / "pack", tmp_path / "out")
    assert checkpoints.read(tmp_path / "out") == tensors


@settings(max_examples=20, deadline=None)
@given(
    tensors=st.dictionaries(NAMES, weights(), min_size=1, max_size=5),
    sparsity=st.floats(0, 1, exclude_max=True),
)
def test_unpacking_a_pruned_pack_gives_back_the_pruned_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: Any,
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]],
    sparsity: float,
) -> None:
    tmp_path = tmp_path_factory.mktemp("roundtrip")
    tensors["model.layers.7.up.weight"] = ("BF16", (65, 3), bytes(range(195)) * 2)
    source = checkpoints.write(tmp_path / "source", tensors)
    pack(source, tmp_path / "pack", prune="magnitude", sparsity=sparsity)
    unpack(tmp_path / "pack", tmp_path / "out")
    assert checkpoints.read(tmp_path / "out") == pruned(source, tensors, sparsity)


def pruned(source: Path, tensors: Any, sparsity: float) -> Any:
    expected = dict(tensors)
    for name, tensor in Checkpoint.open(source).tensors.items():
        if pack_plan.is_prunable(tensor):
            bits = tensor.read_bits()
            if not is_pruned(bits, sparsity):
                bits = magnitude(bits, tensor.dtype, sparsity)
            expected[name] = (tensor.dtype, tensor.shape, bits.tobytes())
    return expected
