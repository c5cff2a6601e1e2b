from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tierd_layouts import tiles
from tierd_layouts.container import (
    LayerBuilder,
    check_layer_bytes,
    layer_array,
    open_pack,
    packed_matrix,
    read_layer,
    tensor_bits,
    validate_layer,
    verify_layer,
    write_index,
    write_shard,
)
from tierd_layouts.errors import (
    ChecksumMismatch,
    FormatError,
    GapNotZero,
    HeadsWrong,
    OffsetsWrong,
    PaddingNotZero,
    ScalesWrong,
    ShardSizeWrong,
    TileError,
    UnknownCodec,
)
from tierd_layouts.index import PackIndex

if TYPE_CHECKING:
    from pathlib import Path

    from tierd_layouts.packed_matrix import PackedMatrix

Weights = dict[str, tuple[str, Any]]


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        value = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([value ^ 1]))


def test_every_weight_comes_back_bit_for_bit(pack: Path, weights: Weights) -> None:
    index = open_pack(pack)
    found = {}
    for layer in index.layers:
        verify_layer(pack, index, layer)
        content = read_layer(pack, index, layer)
        assert isinstance(content, bytes)
        assert len(content) == layer.nbytes
        validate_layer(content, layer)
        for tensor in layer.tensors:
            found[tensor.name] = (tensor.dtype, tensor_bits(content, tensor))
    assert found.keys() == weights.keys()
    for name, (dtype, bits) in weights.items():
        assert found[name][0] == dtype
        assert found[name][1].shape == bits.shape
        np.testing.assert_array_equal(found[name][1], bits)


def test_stored_arrays_are_views_of_the_layer(pack: Path, weights: Weights) -> None:
    index = open_pack(pack)
    layer, tensor = index.tensor("head.weight")
    content = read_layer(pack, index, layer)
    values = layer_array(content, tensor.arrays["values"], np.uint16)
    assert not values.flags.owndata
    bitmap = layer_array(content, tensor.arrays["bitmap"], np.uint64)
    offsets = layer_array(content, tensor.arrays["offsets"], np.uint32)
    np.testing.assert_array_equal(
        tiles.decode(bitmap, offsets, values, *tensor.shape), weights["head.weight"][1]
    )


def test_verifying_tells_how_far_it_is(pack: Path) -> None:
    index = open_pack(pack)
    layer = index.layer("layers.0")
    steps: list[int] = []
    verify_layer(pack, index, layer, on_block=steps.append)
    assert steps == [4 << 20, layer.nbytes - (4 << 20)]


@pytest.mark.parametrize(("place", "block"), [(0, 0), ((4 << 20) - 1, 0), (4 << 20, 1), (-1, 1)])
def test_a_flipped_bit_is_a_mismatch_that_names_layer_block_and_both_sums(
    pack: Path, place: int, block: int
) -> None:
    index = open_pack(pack)
    layer = index.layer("layers.0")
    (extent,) = layer.extents
    offset = extent.offset + place % extent.nbytes
    flip(pack / index.shards[extent.shard].file, offset)
    expected = (
        rf"^/the/pack: layer 'layers.0': block {block} of 2, at \d+ of tierd-00001.safetensors: "
        rf"xxh3 is [0-9a-f]{{16}}, the index says {extent.xxh3[block]:016x}$"
    )
    with pytest.raises(ChecksumMismatch, match=expected):
        verify_layer(pack, index, layer, where="/the/pack")
    with pytest.raises(ChecksumMismatch, match=expected):
        read_layer(pack, index, layer, where="/the/pack")
    verify_layer(pack, index, index.layer("embed"))  # the others are still served


def test_a_shard_that_shrinks_after_it_was_opened_is_refused(pack: Path) -> None:
    index = open_pack(pack)
    os.truncate(pack / index.shards[1].file, 4096)
    for read in (read_layer, verify_layer):
        with pytest.raises(ShardSizeWrong, match="tierd-00002"):
            read(pack, index, index.layer("head"))


def test_bytes_that_came_another_way_are_checked_too(pack: Path) -> None:
    index = open_pack(pack)
    layer = index.layer("embed")
    content = bytearray(read_layer(pack, index, layer))
    check_layer_bytes(memoryview(content), index, layer)
    content[5] ^= 1
    with pytest.raises(ChecksumMismatch, match="layer 'embed'"):
        check_layer_bytes(memoryview(content), index, layer)
    with pytest.raises(ChecksumMismatch):
        check_layer_bytes(memoryview(content)[:-4096], index, layer)


def test_right_checksums_over_wrong_tiles_are_found_by_validation(pack: Path) -> None:
    index = open_pack(pack)
    layer = index.layer("embed")
    content = bytearray(read_layer(pack, index, layer))
    content[layer.tensors[0].arrays["bitmap"].offset] ^= 1
    with pytest.raises(TileError, match=r"layer 'embed': tensor 'embed.weight': "):
        validate_layer(memoryview(content), layer)


def test_padding_that_is_not_zero_is_found_by_validation(pack: Path) -> None:
    index = open_pack(pack)
    for layer in index.layers:
        content = bytearray(read_layer(pack, index, layer))
        ends = [a.offset + a.nbytes for tensor in layer.tensors for a in tensor.arrays.values()]
        for place in (min(end for end in ends if end % 256), layer.nbytes - 1):
            content[place] = 7
            with pytest.raises(
                PaddingNotZero, match=f"byte {place} belongs to no array and is 0x7"
            ):
                validate_layer(memoryview(content), layer)
            content[place] = 0
        validate_layer(memoryview(content), layer)


def test_a_nnz_that_the_bitmap_contradicts_is_found_by_validation(pack: Path) -> None:
    index = open_pack(pack)
    layer = index.layer("embed")
    content = read_layer(pack, index, layer)
    raw = layer.tensors[0]
    wrong = replace(layer, tensors=(replace(raw, nnz=raw.nnz - 1), *layer.tensors[1:]))
    with pytest.raises(FormatError, match=f"nnz is {raw.nnz - 1}"):
        validate_layer(content, wrong)


def test_a_packed_matrix_is_its_arrays_as_views_of_the_layer(
    pack: Path, packed: dict[str, PackedMatrix]
) -> None:
    index = open_pack(pack)
    layer = index.layer("coded")
    content = read_layer(pack, index, layer)
    assert len(layer.tensors) == len(packed) == 18
    for tensor in layer.tensors:
        found, expected = packed_matrix(content, tensor), packed[tensor.name]
        for field in ("codec", "dtype", "rows", "cols", "group", "masked", "nnz", "nbytes"):
            assert getattr(found, field) == getattr(expected, field), field
        assert list(found.arrays()) == list(expected.arrays())
        for name, array in found.arrays().items():
            assert not array.flags.owndata
            np.testing.assert_array_equal(array, expected.arrays()[name])
    raw = index.tensor("head.weight")[1]
    assert packed_matrix(read_layer(pack, index, index.layer("head")), raw).codec == "raw"


def test_a_dense_tensor_has_no_packed_form(pack: Path) -> None:
    index = open_pack(pack)
    layer, tensor = index.tensor("layers.0.norm.weight")
    with pytest.raises(UnknownCodec, match=r"'layers.0.norm.weight' has codec dense"):
        packed_matrix(read_layer(pack, index, layer), tensor)


@pytest.mark.parametrize(
    ("name", "array", "place", "flip", "error"),
    [
        ("coded.exponent-packed.BF16.masked", "heads", 1, 0xFF, HeadsWrong),
        ("coded.exponent-packed.F32.all", "offsets", 0, 0xFF, OffsetsWrong),
        ("coded.exponent-packed.F16.all", "values", -1, 0xFF, GapNotZero),
        ("coded.int8.BF16.all", "scales", 1, 0xFF, ScalesWrong),
        ("coded.int4.F32.masked", "bitmap", 0, 1, TileError),
    ],
)
def test_right_checksums_over_wrong_records_are_found_by_validation(
    pack: Path, name: str, array: str, place: int, flip: int, error: type[TileError]
) -> None:
    index = open_pack(pack)
    layer, tensor = index.tensor(name)
    content = bytearray(read_layer(pack, index, layer))
    stored = tensor.arrays[array]
    content[stored.offset + place % stored.nbytes] ^= flip
    with pytest.raises(error, match=f"layer 'coded': tensor '{name}': "):
        validate_layer(memoryview(content), layer)


def test_a_layer_of_two_extents_is_read_in_their_order(tmp_path: Path) -> None:
    parts = []
    for name in ("b", "a"):
        builder = LayerBuilder(name)
        builder.add_dense(f"{name}.weight", "U8", (5000,), name.encode() * 5000)
        parts.append(builder.finish())
    shard, (b, a) = write_shard(tmp_path / "s.safetensors", 0, parts)
    moved = replace(
        b.tensors[0], arrays={"data": replace(b.tensors[0].arrays["data"], offset=a.nbytes)}
    )
    joined = replace(
        a,
        nbytes=a.nbytes + b.nbytes,
        extents=a.extents + b.extents,
        tensors=(*a.tensors, moved),
    )
    write_index(tmp_path, PackIndex(1, "t", "", (shard,), (joined,)))
    index = open_pack(tmp_path)
    content = read_layer(tmp_path, index, joined)
    verify_layer(tmp_path, index, joined)
    assert content == b"a" * 5000 + bytes(3192) + b"b" * 5000 + bytes(3192)
    assert tensor_bits(content, joined.tensors[1]).tobytes() == b"b" * 5000
