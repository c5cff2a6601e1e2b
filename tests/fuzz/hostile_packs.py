"""Small packs as file name -> bytes, what somebody could do to them, and what must hold then."""

import json
import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from tierd_layouts import index_json
from tierd_layouts.container import LayerBuilder, shard_file_name, write_index, write_shard
from tierd_layouts.errors import FormatError
from tierd_layouts.index import BLOCK_BYTES, INDEX_FILE, PackIndex
from tierd_layouts.layer_reader import (
    packed_matrix,
    read_layer,
    tensor_bits,
    validate_layer,
    verify_layer,
)
from tierd_layouts.pack_reader import open_pack

if TYPE_CHECKING:
    from tests.fuzz.choices import Choices
    from tierd_layouts.packed_matrix import PackedMatrix

Files = dict[str, bytes]
_LENGTH: Final = struct.Struct("<Q")


def any_pack(choices: "Choices", matrices: dict[str, Any]) -> Files:
    """Return a pack after up to four changes. Every other has a matrix that was mutated before."""
    if choices.flag():
        matrix = matrices["any_matrix"](choices)
        try:
            files = _written((matrices["mutate"](choices, matrix),))
        except FormatError:  # nobody wrote such a pack with our writer
            return {}
    else:
        files = dict(_seed(choices.below(3), matrices["_seed"], tuple(matrices["FORMS"])))
    for _ in range(choices.below(5)):
        files = choices.pick(_STEPS)(choices, files)
    return files


def check_pack(files: Files, check_matrix: Callable[..., bool], own_memory: Any) -> bool:
    """Return whether the pack is right; raises unless a wrong one is refused by a FormatError."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        try:
            index = open_pack(folder)
        except FormatError:
            return False
        again = PackIndex.parse(index.to_json(), where="again")
        assert again == index, "an index that was written again differs"
        assert again.digest == index.digest
        right = [
            _check_layer(folder, index, layer, check_matrix, own_memory) for layer in index.layers
        ]
        return all(right)


def _check_layer(
    folder: str, index: PackIndex, layer: Any, check_matrix: Callable[..., bool], own_memory: Any
) -> bool:
    try:
        verify_layer(folder, index, layer)
        hashes_right = True
    except FormatError:
        hashes_right = False
    try:
        content = read_layer(folder, index, layer)
    except FormatError:
        assert not hashes_right, "verify_layer and read_layer disagree"
        return False
    assert hashes_right, "verify_layer and read_layer disagree"
    try:
        validate_layer(content, layer)
        accepted = True
    except FormatError:
        accepted = False
    for tensor in layer.tensors:
        if tensor.codec == "dense":
            assert tensor_bits(content, tensor).shape == tensor.shape
        else:
            matrix: PackedMatrix = own_memory(packed_matrix(content, tensor))
            matrix_accepted = check_matrix(matrix, tensor.nnz)
            assert matrix_accepted or not accepted, "validate_layer accepts a refused matrix"
    return accepted


@cache
def _seed(number: int, make: Any, forms: tuple[tuple[str, bool], ...]) -> Files:
    """One matrix; every form; an empty matrix beside others."""
    some = [(forms[1], (65, 3))], [(form, (70, 70)) for form in forms], [(forms[0], (0, 64))]
    dtype = ("BF16", "F16", "F32")[number]
    return _written(tuple(make(form, dtype, shape, "sparse", 64) for form, shape in some[number]))


def _written(matrices: tuple["PackedMatrix", ...]) -> Files:
    """Return a pack of two shards: the matrices in two layers, with dense tensors, and an alias."""
    with tempfile.TemporaryDirectory() as folder:
        builders = [LayerBuilder("embed"), LayerBuilder("layers.0"), LayerBuilder("layers.1")]
        builders[0].add_dense("embed.weight", "BF16", (3, 5), np.arange(15, dtype=np.uint16))
        builders[1].add_dense("layers.0.scale", "F32", (), np.array(1, np.uint32))
        for number, matrix in enumerate(matrices):
            which = number % 2
            builders[1 + which].add_matrix(f"layers.{which}.w{number}", matrix)
        layers = [builder.finish() for builder in builders]
        shards, records = [], []
        for number, part in enumerate((layers[:2], layers[2:])):
            path = Path(folder, shard_file_name(number))
            shard, written = write_shard(path, number, part)
            shards.append(shard)
            records += written
        index = PackIndex(
            version=1,
            tool="fuzz",
            source_digest="0",
            shards=tuple(shards),
            layers=tuple(records),
            aliases={"head.weight": "embed.weight"},
            metadata={"format": "pt"},
        )
        write_index(folder, index)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


# --------------------------------------------------------------------------------------------------
# Changes


def sealed(body: dict[str, Any]) -> bytes:
    """Return tierd.json with the checksum that belongs to it."""
    body = {name: value for name, value in body.items() if name != "xxh3"}
    return json.dumps({**body, "xxh3": index_json.digest(body)}).encode()


def change_json(choices: "Choices", value: Any) -> Any:
    """Return a JSON value, one node of it replaced, removed, doubled or moved."""
    node: Any = value
    path: list[tuple[Any, Any]] = []
    while isinstance(node, dict | list) and node and (not path or choices.below(5)):
        place = choices.pick(list(node)) if isinstance(node, dict) else choices.below(len(node))
        path.append((node, place))
        node = node[place]
    if not path:
        return _any_json(choices, value)
    parent, place = path[-1]
    match choices.below(6):
        case 0:
            del parent[place]
        case 1 if isinstance(parent, list):
            parent.append(parent[choices.below(len(parent))])
        case 1:
            parent[f"{place}x"[choices.below(2) :]] = parent[place]
        case 2:
            other = choices.pick(list(parent)) if isinstance(parent, dict) else -1
            parent[place], parent[other] = parent[other], parent[place]
        case _:
            parent[place] = _any_json(choices, node)
    return value


_TEXTS: Final = (
    *("", "raw", "dense", "int8", "exponent-packed", "BF16", "F32", "U8", "../x", "a/b", "\0"),
    *("\ud800", "__metadata__", "tierd-00001.safetensors", "x" * 300, "ffffffffffffffff"),
)


def _any_json(choices: "Choices", old: Any) -> Any:
    if isinstance(old, int) and choices.flag():
        return old + choices.pick((-4096, -256, -16, -1, 1, 16, 256, 4096))
    match choices.below(8):
        case 0:
            return None
        case 1:
            return choices.pick(_TEXTS)
        case 2:
            return [old]
        case 3:
            return choices.pick(({}, [], True, 1.5, -1, 1e400, {"a": []}))
        case _:
            return choices.integer()


def _change_index(choices: "Choices", files: Files) -> Files:
    try:
        body = change_json(choices, json.loads(files[INDEX_FILE]))
        return {**files, INDEX_FILE: sealed(body)}
    except (KeyError, ValueError, AttributeError):  # an earlier change left no index to be changed
        return files


def _change_header(choices: "Choices", files: Files) -> Files:
    name = _shard(choices, files)
    if name is None or len(files[name]) < _LENGTH.size:
        return files
    content = files[name]
    (nbytes,) = _LENGTH.unpack_from(content)
    try:
        header = change_json(choices, json.loads(content[8 : 8 + nbytes]))
    except ValueError:
        return files
    text = json.dumps(header).encode()
    text = text.ljust(nbytes) if choices.below(4) else text
    return {**files, name: _LENGTH.pack(len(text)) + text + content[8 + nbytes :]}


def _change_bytes(choices: "Choices", files: Files) -> Files:
    """In any file: one byte, mostly with the hashes that belong to the result."""
    if not files:
        return files
    name = choices.pick(sorted(files))
    content = bytearray(files[name])
    if content:
        content[choices.below(len(content))] = choices.below(256)
    return _hashed({**files, name: bytes(content)}) if choices.below(4) else files


def _cut_or_extend(choices: "Choices", files: Files) -> Files:
    if not files:
        return files
    name = choices.pick(sorted(files))
    content = files[name]
    content = content[: choices.below(len(content) + 1)] + bytes(choices.below(2) * 4096)
    return {**files, name: content}


def _remove(choices: "Choices", files: Files) -> Files:
    gone = choices.pick(sorted(files)) if files else ""
    return {name: content for name, content in files.items() if name != gone}


def _shard(choices: "Choices", files: Files) -> str | None:
    names = sorted(name for name in files if name != INDEX_FILE)
    return choices.pick(names) if names else None


def _hashed(files: Files) -> Files:
    """Return the pack with right hashes in its index, if that still has the form of one."""
    try:
        body = json.loads(files[INDEX_FILE])
        for layer in body["layers"]:
            for extent in layer["extents"]:
                shard = files[body["shards"][extent["shard"]]["file"]]
                part = shard[extent["offset"] : extent["offset"] + extent["nbytes"]]
                extent["xxh3"] = [
                    xxhash.xxh3_64_hexdigest(part[at : at + BLOCK_BYTES])
                    for at in range(0, len(part), BLOCK_BYTES)
                ]
        return {**files, INDEX_FILE: sealed(body)}
    except (KeyError, ValueError, TypeError, IndexError):
        return files


_STEPS: Final[tuple[Callable[["Choices", Files], Files], ...]] = (
    *(_change_index, _change_index, _change_index, _change_header, _change_header),
    *(_change_bytes, _change_bytes, _change_bytes, _cut_or_extend, _remove),
)
