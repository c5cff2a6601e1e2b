"""Headers of safetensors files: read strictly, and built so that data begins on a page.

A header is 8 bytes of little-endian length, then JSON, then spaces. The rules are those of the
safetensors crate: at most 100 MB, tensors without holes or overlaps, and nothing after the last.
Source: github.com/huggingface/safetensors, README.md "Format" and `safetensors/src/tensor.rs`.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from tierd_layouts import strict_json
from tierd_layouts.dtypes import ITEM_BYTES
from tierd_layouts.errors import (
    DataHoles,
    HeaderEntryInvalid,
    HeaderNotJson,
    HeaderTooLarge,
    ShardTrailingBytes,
    ShardTruncated,
    TensorBytesWrong,
    UnknownDtype,
)
from tierd_layouts.excerpt import excerpt
from tierd_layouts.names import METADATA_NAME
from tierd_layouts.records import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_HEADER_BYTES = 100_000_000
_MAX_INTEGER = (1 << 64) - 1
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor; its bytes are `[begin, end)` after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """A file's tensors, by name; `data_start` is where `begin` counts from."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int
    #: `__metadata__` is optional, and a file without it differs from one with an empty one.
    has_metadata: bool = field(default=False)


def read_header(source: int | str | os.PathLike[str], *, where: str | None = None) -> Header:
    """Returns the header of an open descriptor or a path, checked against the file's size.

    where: how errors name the file. Raises a ShardError subclass; OSError from the system.
    """
    if not isinstance(source, int):
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return read_header(fd, where=where or os.fspath(source))
        finally:
            os.close(fd)
    where = where or f"descriptor {source}"
    file_bytes = os.fstat(source).st_size
    prefix = _read_exactly(source, _LENGTH.size, 0, where)
    (header_bytes,) = _LENGTH.unpack(prefix)
    if header_bytes > MAX_HEADER_BYTES:
        raise HeaderTooLarge(
            f"{where}: the header says it has {header_bytes} bytes, the limit is {MAX_HEADER_BYTES}"
        )
    if _LENGTH.size + header_bytes > file_bytes:
        raise ShardTruncated(
            f"{where}: the header needs {_LENGTH.size + header_bytes} bytes, the file has "
            f"{file_bytes}"
        )
    text = _read_exactly(source, header_bytes, _LENGTH.size, where)
    return parse_header(text, file_bytes=file_bytes, where=where)


def parse_header(text: bytes, *, file_bytes: int, where: str) -> Header:
    """Returns the header in `text`, the JSON without its length. Raises a ShardError subclass."""
    members = _parse_json(text, where)
    has_metadata = METADATA_NAME in members
    metadata = _parse_metadata(members.pop(METADATA_NAME, {}), where)
    entries = {
        name: _parse_entry(value, f"{where}: {excerpt(name)}") for name, value in members.items()
    }
    data_start = _LENGTH.size + len(text)
    position, last = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise DataHoles(
                f"{where}: {excerpt(name)} begins at {entry.begin}, but {last} ended at {position}"
            )
        position, last = entry.end, excerpt(name)
    needed = data_start + position
    if file_bytes < needed:
        raise ShardTruncated(f"{where}: {last} ends at {needed}, the file has {file_bytes} bytes")
    if file_bytes > needed:
        raise ShardTrailingBytes(
            f"{where}: {last} ends at {needed}, the file goes on to {file_bytes}"
        )
    return Header(entries, metadata, data_start, has_metadata)


def build_header(
    entries: Mapping[str, Entry], metadata: Mapping[str, str], *, alignment: int = PAGE_BYTES
) -> bytes:
    """Returns length, JSON and spaces up to a multiple of `alignment`; data follows at its end.

    Raises HeaderTooLarge: the tensors must go into more files.
    """
    members: dict[str, object] = {METADATA_NAME: dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        members[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(members, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(_LENGTH.size + len(text)) % alignment)
    if len(text) > MAX_HEADER_BYTES:
        raise HeaderTooLarge(
            f"{len(entries)} tensors need a header of {len(text)} bytes, the limit is "
            f"{MAX_HEADER_BYTES}"
        )
    return _LENGTH.pack(len(text)) + text


# --------------------------------------------------------------------------------------------------


def _read_exactly(fd: int, nbytes: int, offset: int, where: str) -> bytes:
    pieces = []
    while nbytes:
        piece = os.pread(fd, nbytes, offset)
        if not piece:
            raise ShardTruncated(f"{where}: ends at {offset}, {nbytes} bytes more are needed")
        pieces.append(piece)
        nbytes -= len(piece)
        offset += len(piece)
    return b"".join(pieces)


def _parse_json(text: bytes, where: str) -> dict[str, object]:
    try:
        members = strict_json.parse(text)
    except (ValueError, RecursionError) as error:
        raise HeaderNotJson(f"{where}: the header is not JSON: {str(error)[:200]}") from error
    # The crate demands `{` as the first byte, so that a file is never also something else.
    if not isinstance(members, dict) or text[:1] != b"{":
        raise HeaderNotJson(f"{where}: the header does not begin with an object: {text[:20]!r}")
    for name in members:
        if not name.isprintable() and any("\ud800" <= c <= "\udfff" for c in name):
            raise HeaderNotJson(f"{where}: name {excerpt(name)} is not Unicode")
    return members


def _parse_metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise HeaderEntryInvalid(f"{where}: {METADATA_NAME} is not an object of texts")
    return value


def _parse_entry(value: object, where: str) -> Entry:
    if not isinstance(value, dict) or sorted(value) != ["data_offsets", "dtype", "shape"]:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise HeaderEntryInvalid(
            f"{where}: needs exactly dtype, shape and data_offsets, found {excerpt(found)}"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UnknownDtype(f"{where}: dtype {excerpt(dtype)}, known are {', '.join(ITEM_BYTES)}")
    if not _are_integers(shape):
        raise HeaderEntryInvalid(f"{where}: shape {excerpt(shape)} is not a list of integers")
    if not _are_integers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderEntryInvalid(
            f"{where}: data_offsets {excerpt(offsets)} are not [begin, end] with begin <= end"
        )
    entry = Entry(dtype, tuple(shape), offsets[0], offsets[1])
    needed = prod(entry.shape) * ITEM_BYTES[dtype]
    if entry.nbytes != needed:
        raise TensorBytesWrong(
            f"{where}: data_offsets hold {entry.nbytes} bytes, {dtype}{excerpt(list(entry.shape))} "
            f"needs {excerpt(needed)}"
        )
    return entry


def _are_integers(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= _MAX_INTEGER
        for item in value
    )
