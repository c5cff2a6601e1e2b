"""Targets over texts and streams: index, header, bitmask checkpoints, frames."""

import json
import runpy
import struct
import tempfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgpack  # type: ignore[import-untyped]
import numpy as np

from tierd_layouts.errors import FormatError, FrameTooLarge, MalformedFrame
from tierd_layouts.index import PackIndex
from tierd_layouts.safetensors_file import parse_header
from tierd_layouts.wire import FrameDecoder, encode
from tierd_tools import bitmask
from tierd_tools.checkpoint import Checkpoint
from tierd_tools.errors import CheckpointError

if TYPE_CHECKING:
    from tests.fuzz.choices import Choices

_packs = runpy.run_path(str(Path(__file__).with_name("hostile_packs.py")))
MakeChoices = Callable[[bytes], "Choices"]


def index(make: MakeChoices, data: bytes) -> bool:
    """Any text as an index, sealed where it is an object."""
    try:
        body = json.loads(data)
        data = _packs["sealed"](body) if isinstance(body, dict) else data
    except (ValueError, RecursionError):
        pass
    try:
        PackIndex.parse(data, where="text")
    except FormatError:
        return False
    return True


def header(make: MakeChoices, data: bytes) -> bool:
    """Any text as the header of a file with 0 to 255 bytes of data."""
    file_bytes = 8 + len(data[1:]) + data[0] if data else 8
    try:
        found = parse_header(data[1:], file_bytes=file_bytes, where="text")
    except FormatError:
        return False
    assert all(found.data_start + entry.end <= file_bytes for entry in found.entries.values())
    return True


def wire(make: MakeChoices, data: bytes) -> bool:
    """A stream of frames, cut anywhere; the messages do not depend on where."""
    chosen = make(data)
    messages = [_message(chosen) for _ in range(chosen.below(3))]
    stream = bytearray(b"".join(encode(message) for message in messages))
    for _ in range(chosen.below(4)):
        if stream:
            stream[chosen.below(len(stream))] = chosen.below(256)
    stream += chosen.take(chosen.below(300))
    whole = _decoded([bytes(stream)])
    cuts = sorted(chosen.below(len(stream) + 1) for _ in range(chosen.below(4)))
    pieces = [bytes(stream[a:b]) for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert repr(_decoded(pieces)) == repr(whole), "frames depend on how they arrive"
    return len(whole) == len(messages)


def _message(choices: "Choices") -> dict[str, Any]:
    values: tuple[Any, ...] = (
        None,
        -1,
        2**40,
        "text",
        b"bytes",
        [],
        [1, [2]],
        {"a": {}},
        1.5,
        "x" * 300,
    )
    names = ("op", "layers", "id", "")
    return {choices.pick(names): choices.pick(values) for _ in range(choices.below(4))}


def _decoded(pieces: list[bytes]) -> list[Any]:
    decoder = FrameDecoder()
    found: list[Any] = []
    for piece in pieces:
        try:
            decoder.feed(piece)
        except FrameTooLarge:
            break
        while True:
            try:
                message = next(decoder)
            except StopIteration:
                break
            except MalformedFrame:
                found.append("malformed")
            except FrameTooLarge:
                found.append("too large")
                break
            else:
                msgpack.packb(message)  # what came out is plain data
                found.append(message)
    return found


# --------------------------------------------------------------------------------------------------
# Checkpoints with weights in a bitmask format

_COLUMNS: Final = (1, 8, 9, 64, 70)


def bitmask_checkpoint(make: MakeChoices, data: bytes) -> bool:
    """A checkpoint whose parts, header or config were changed: decoded, or refused by name."""
    choices = make(data)
    rng = np.random.default_rng(choices.below(256))
    shape = (choices.below(4), choices.pick(_COLUMNS))
    bits = rng.integers(0, 3, shape, np.uint16) * rng.integers(0, 30000, shape, np.uint16)
    encoded = bitmask.encode(bits)
    name = choices.pick(("a.0.up.weight", "a.0.up"))
    parts: dict[str, tuple[str, list[Any], bytearray]] = {
        f"{name}.shape": ("I64", [2], bytearray(np.array(shape, "<i8").tobytes())),
        f"{name}.bitmask": ("U8", [*encoded.bitmask.shape], bytearray(encoded.bitmask.tobytes())),
        f"{name}.compressed": ("BF16", [encoded.values.size], bytearray(encoded.values.tobytes())),
        f"{name}.row_offsets": ("I64", [shape[0]], bytearray(encoded.row_offsets.tobytes())),
        "n.weight": ("BF16", [2], bytearray(4)),
    }
    for _ in range(choices.below(4)):
        _, _, content = parts[choices.pick(sorted(parts))]
        if content:
            content[choices.below(len(content))] = choices.below(256)
    if not choices.below(3):
        sizes = np.array([choices.integer() % 2**63, choices.integer() % 2**63], "<i8")
        sizes *= rng.integers(0, 2, 2)
        parts[f"{name}.shape"][2][:] = sizes.tobytes()
        mask = [int(sizes[0]), -(-int(sizes[1]) // 8)]
        parts[f"{name}.bitmask"] = ("U8", mask, bytearray(min(prod(mask), 64)))
    text, stored = _file(parts)
    header = json.loads(text)
    config: Any = {"model_type": "x", "quantization_config": {"sparsity_config": {"format": "a"}}}
    for _ in range(choices.below(3)):
        if choices.flag():
            header = _packs["change_json"](choices, header)
        else:
            config = _packs["change_json"](choices, config)
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        file = struct.pack("<Q", len(text)) + text + stored
        Path(folder, "model.safetensors").write_bytes(file)
        Path(folder, "config.json").write_text(json.dumps(config))
        try:
            tensors = Checkpoint.open(folder).tensors
            for tensor in tensors.values():
                whole = tensor.read()
                assert whole.nbytes == tensor.nbytes
                assert tensor.sample_bits(64).nbytes <= 64 + 7
        except CheckpointError:
            return False
    return True


def _file(parts: dict[str, tuple[str, list[Any], bytearray]]) -> tuple[bytes, bytes]:
    header: dict[str, Any] = {}
    stored = bytearray()
    for name, (dtype, shape, content) in parts.items():
        end = len(stored) + len(content)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(stored), end]}
        stored += content
    return json.dumps(header).encode(), bytes(stored)


TARGETS: Final[dict[str, Callable[[MakeChoices, bytes], bool]]] = {
    "index": index,
    "header": header,
    "wire": wire,
    "bitmask": bitmask_checkpoint,
}
