"""The GGUF container, version 3: metadata, a table of tensors, aligned data. All little-endian.

Layout after ggml's docs/gguf.md: magic, version, counts, key-value pairs, tensor infos, padding to
the alignment, then each tensor's bytes, every one padded to the alignment. Dimensions are written
innermost first, the reverse of a shape. A file is written beside its name and renamed when whole.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

#: ggml_type of what we write, and the bytes of an element
F32, BF16 = 0, 30
ITEM_BYTES = {F32: 4, BF16: 2}

_UINT32, _FLOAT32, _STRING = 4, 6, 8

Value = int | float | str


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor to be written; `read` is called once, when its turn comes."""

    name: str
    type: int
    shape: tuple[int, ...]
    read: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.type]


def write(path: Path, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> None:
    """Write the file, with the memory of one tensor.

    Raises ValueError when a tensor has other bytes than its shape says, OSError of the disk.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(header(metadata, tensors))
            for tensor in tensors:
                data = tensor.read()
                if data.nbytes != tensor.nbytes:
                    raise ValueError(
                        f"{tensor.name}: {data.nbytes} bytes, its shape says {tensor.nbytes}"
                    )
                file.write(data.tobytes())
                file.write(b"\0" * (_padded(tensor.nbytes) - tensor.nbytes))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def header(metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]) -> bytes:
    """Everything before the first tensor's bytes, padded."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        parts.append(_string(tensor.name))
        parts.append(struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions))
        parts.append(struct.pack("<IQ", tensor.type, offset))
        offset += _padded(tensor.nbytes)
    whole = b"".join(parts)
    return whole + b"\0" * (_padded(len(whole)) - len(whole))


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    return struct.pack("<II", _UINT32, value)
