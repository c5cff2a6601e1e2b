"""tierd.json between text and records: member names, types, and the index's own checksum.

Only form is judged here; whether the numbers can be true is `index_rules`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import xxhash

from tierd_layouts import strict_json
from tierd_layouts.errors import (
    IndexChecksumWrong,
    IndexNotJson,
    IndexTooLarge,
    UnsupportedVersion,
    WrongFormatName,
)
from tierd_layouts.excerpt import excerpt
from tierd_layouts.json_members import Members, hash_of, integer_of, integers_of, pair_of
from tierd_layouts.records import FORMAT_NAME, FORMAT_VERSION, Array, Extent, Layer, Shard, Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_INDEX_BYTES = 256 << 20


def load(text: bytes, where: str) -> tuple[Members, str]:
    """Returns the index's members without `format`, `version` and `xxh3`, and its digest.

    The order of the checks matters: a newer version is named as such, even when its checksum rule
    or its members changed.
    """
    if len(text) > MAX_INDEX_BYTES:
        raise IndexTooLarge(f"{where}: {len(text)} bytes, the limit is {MAX_INDEX_BYTES}")
    body = _parse(text, where)
    if body.get("format") != FORMAT_NAME:
        raise WrongFormatName(
            f"{where}: format is {excerpt(body.get('format'))}, expected {FORMAT_NAME!r}"
        )
    version = integer_of(body.get("version"), f"{where}: version")
    if version != FORMAT_VERSION:
        raise UnsupportedVersion(
            f"{where}: format version {version}, this tierd reads {FORMAT_VERSION}"
        )
    stated = body.pop("xxh3", None)
    try:
        found = digest(body)
    except RecursionError as error:  # just shallow enough to be read, too deep to be written
        raise IndexNotJson(f"{where}: not an index: nested too deeply") from error
    if stated != found:
        raise IndexChecksumWrong(
            f"{where}: xxh3 of the index is {found}, it says {excerpt(stated)}"
        )
    del body["format"], body["version"]
    return Members(body, where), found


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = strict_json.parse(text)
    except (ValueError, RecursionError) as error:  # both Unicode and JSON errors are ValueErrors
        raise IndexNotJson(f"{where}: not an index: {str(error)[:200]}") from error
    if not isinstance(value, dict):
        raise IndexNotJson(f"{where}: not an index: expected an object, found {excerpt(value)}")
    return value


def digest(body: Mapping[str, Any]) -> str:
    """Returns 16 hex digits: xxh3_64 of the canonical text of an index without its `xxh3`."""
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return xxhash.xxh3_64_hexdigest(canonical.encode("ascii"))


def dump(body: dict[str, Any]) -> tuple[bytes, str]:
    """Returns tierd.json and its digest; `body` is everything but format, version and xxh3."""
    whole = {"format": FORMAT_NAME, "version": FORMAT_VERSION, **body}
    found = digest(whole)
    ordered = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "xxh3": found, **body}
    return json.dumps(ordered, indent=1, ensure_ascii=True).encode("ascii") + b"\n", found


# --------------------------------------------------------------------------------------------------
# Records from members, members from records


def read_shard(value: object, where: str) -> Shard:
    members = Members(value, where)
    shard = Shard(file=members.text("file"), nbytes=members.integer("nbytes"))
    members.finish()
    return shard


def read_layer(value: object, where: str) -> Layer:
    members = Members(value, where)
    layer = Layer(
        name=members.text("name"),
        nbytes=members.integer("nbytes"),
        extents=tuple(
            _read_extent(item, f"{where}.extents[{i}]")
            for i, item in enumerate(members.items("extents"))
        ),
        tensors=tuple(
            _read_tensor(item, f"{where}.tensors[{i}]")
            for i, item in enumerate(members.items("tensors"))
        ),
    )
    members.finish()
    return layer


def _read_extent(value: object, where: str) -> Extent:
    members = Members(value, where)
    extent = Extent(
        shard=members.integer("shard"),
        offset=members.integer("offset"),
        nbytes=members.integer("nbytes"),
        xxh3=tuple(
            hash_of(item, f"{where}.xxh3[{i}]") for i, item in enumerate(members.items("xxh3"))
        ),
    )
    members.finish()
    return extent


def _read_tensor(value: object, where: str) -> Tensor:
    members = Members(value, where)
    tile = members.take("tile")
    part = members.take("slice")
    group = members.take("group")
    arrays = Members(members.take("arrays"), f"{where}.arrays")
    tensor = Tensor(
        name=members.text("name"),
        shape=members.integers("shape"),
        dtype=members.text("dtype"),
        codec=members.text("codec"),
        order=members.text("order"),
        tile=None if tile is None else pair_of(tile, f"{where}.tile"),
        nnz=members.integer("nnz"),
        arrays={
            name: _read_array(arrays.take(name), f"{where}.arrays[{excerpt(name)}]")
            for name in arrays.names()
        },
        source=members.text("source"),
        slice=None if part is None else integers_of(part, f"{where}.slice"),
        group=None if group is None else integer_of(group, f"{where}.group"),
    )
    members.finish()
    return tensor


def _read_array(value: object, where: str) -> Array:
    members = Members(value, where)
    array = Array(offset=members.integer("offset"), nbytes=members.integer("nbytes"))
    members.finish()
    return array


def write_shard(shard: Shard) -> dict[str, Any]:
    return {"file": shard.file, "nbytes": shard.nbytes}


def write_layer(layer: Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "nbytes": layer.nbytes,
        "extents": [
            {
                "shard": extent.shard,
                "offset": extent.offset,
                "nbytes": extent.nbytes,
                # Text, because 64-bit numbers lose digits in JSON readers that use doubles.
                "xxh3": [f"{value:016x}" for value in extent.xxh3],
            }
            for extent in layer.extents
        ],
        "tensors": [_write_tensor(tensor) for tensor in layer.tensors],
    }


def _write_tensor(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "codec": tensor.codec,
        "order": tensor.order,
        "tile": None if tensor.tile is None else list(tensor.tile),
        "nnz": tensor.nnz,
        "arrays": {
            name: {"offset": array.offset, "nbytes": array.nbytes}
            for name, array in tensor.arrays.items()
        },
        "source": tensor.source,
        "slice": None if tensor.slice is None else list(tensor.slice),
        "group": tensor.group,
    }
