"""Which tensors of a checkpoint are parts of a weight in a bitmask format of compressed-tensors.

Decided for each weight by its complete set of parts, `shape`, `compressed` and `bitmask`, wherever
in the shards they are. Two dialects name them:

    A (0.4 to 0.8)    `a.b.weight.bitmask`, every parameter, biases and norms too
    B (0.9 to 0.14)   `a.b.bitmask`, weights only; the others stay as they are

A bare `a.b` could be a parameter of A or a module of B. Every tensor of an A checkpoint is
compressed, so one of them ends in `.weight`, and none of B does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd_tools.bitmask import BitmaskTensor
from tierd_tools.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tierd_tools.source_tensor import FileTensor, SourceTensor

_PARTS = ("shape", "compressed", "bitmask")
#: what a reader takes for a part, whatever it is
PART_NAMES = (*_PARTS, "row_offsets")
#: what compressed-tensors puts beside a weight that it quantised
_QUANTISED = frozenset(
    f"{what}_{part}"
    for what in ("weight", "input", "output")
    for part in ("scale", "zero_point", "global_scale", "g_idx", "packed")
)
_MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True)
class Recognised:
    """The weights of a checkpoint; `formats` counts those that were in a bitmask format."""

    tensors: Mapping[str, SourceTensor]
    formats: Mapping[str, int]

    def text(self) -> str:
        """`45 tensors from sparse-bitmask`; empty when there were none."""
        counts = (f"{count} tensors from {name}" for name, count in sorted(self.formats.items()))
        return ", ".join(counts)


def recognise(stored: Mapping[str, FileTensor]) -> Recognised:
    """Replaces the parts of each compressed weight by the weight. Reads its shape, nothing else.

    A tensor that is merely named like a part stays what it is.
    Raises CheckpointError for a set that contradicts itself or lacks a part, and when the weights
    are quantised as well.
    """
    sets = _sets(stored)
    if not sets:
        return Recognised(dict(stored), {})
    parts = {f"{prefix}.{part}" for prefix in sets for part in PART_NAMES}
    tensors: dict[str, SourceTensor] = {n: t for n, t in stored.items() if n not in parts}
    names = _names(sets)
    formats: dict[str, int] = {}
    for prefix, found in sets.items():
        name = names[prefix]
        if name in tensors:
            raise CheckpointError(
                f"tensor {name!r} is there twice: as it is and as {prefix}.bitmask"
            )
        tensors[name] = _weight(name, found)
        kind = "sparse-bitmask" if len(found["compressed"].shape) == 1 else "sparse-24-bitmask"
        formats[kind] = formats.get(kind, 0) + 1
    _refuse_quantised(tensors)
    return Recognised(tensors, formats)


def _sets(stored: Mapping[str, FileTensor]) -> dict[str, dict[str, FileTensor]]:
    """{prefix: {part: tensor}}, complete ones."""
    sets: dict[str, dict[str, FileTensor]] = {}
    for name, tensor in stored.items():
        prefix, _, part = name.rpartition(".")
        if prefix and part in _PARTS:
            sets.setdefault(prefix, {})[part] = tensor
    complete = {}
    for prefix, found in sets.items():
        missing = [part for part in _PARTS if part not in found]
        if not missing:
            complete[prefix] = found
        elif len(found) == 2 and all(_looks_like(part, found[part]) for part in found):
            there = " and ".join(f"{prefix}.{part}" for part in found)
            raise CheckpointError(f"{there} are parts of a compressed weight without {missing[0]}")
    return complete


def _looks_like(part: str, tensor: FileTensor) -> bool:
    match part:
        case "shape":
            return tensor.dtype == "I64"
        case "bitmask":
            return tensor.dtype == "U8"
        case _:
            return True


def _names(prefixes: Iterable[str]) -> dict[str, str]:
    """{prefix: name of the weight}."""
    prefixes = list(prefixes)
    whole = any(prefix.rpartition(".")[2] in ("weight", "bias") for prefix in prefixes)
    return {prefix: prefix if whole else f"{prefix}.weight" for prefix in prefixes}


def _weight(name: str, found: Mapping[str, FileTensor]) -> BitmaskTensor:
    values, bitmask = found["compressed"], found["bitmask"]
    shape = _shape(name, found["shape"])
    if bitmask.dtype != "U8":
        raise CheckpointError(f"tensor {bitmask.name!r} is {bitmask.dtype}, a bitmask is U8")
    packed = (*shape[:-1], -(-shape[-1] // 8))
    if bitmask.shape != packed:
        raise CheckpointError(
            f"tensor {bitmask.name!r} has shape {list(bitmask.shape)}, a weight of shape "
            f"{list(shape)} needs {list(packed)}"
        )
    weight = BitmaskTensor(name, shape, values, bitmask)
    if len(values.shape) not in (1, 2) or values.elements > weight.elements:
        raise CheckpointError(
            f"tensor {values.name!r} has shape {list(values.shape)}: not the values of a weight of "
            f"shape {list(shape)}"
        )
    return weight


def _shape(name: str, tensor: FileTensor) -> tuple[int, ...]:
    """The content of a `shape` tensor: `[n]`, or `[n, 1]` in sparse-24-bitmask."""
    count = tensor.elements
    if tensor.dtype != "I64" or tensor.shape not in ((count,), (count, 1)):
        raise CheckpointError(
            f"tensor {tensor.name!r} is {tensor.dtype}{list(tensor.shape)}, the shape of a weight "
            "is I64[n] or I64[n, 1]"
        )
    if not 0 < count <= _MAX_DIMENSIONS:
        raise CheckpointError(
            f"tensor {tensor.name!r} has {count} elements, a weight has 1 to {_MAX_DIMENSIONS} "
            "dimensions"
        )
    shape = tuple(int(size) for size in tensor.read().view("<i8"))
    if min(shape) < 0:
        raise CheckpointError(f"tensor {tensor.name!r} says that {name!r} has shape {list(shape)}")
    return shape


def _refuse_quantised(tensors: Iterable[str]) -> None:
    quantised = sorted(name for name in tensors if name.rpartition(".")[2] in _QUANTISED)
    if quantised:
        raise CheckpointError(
            f"{len(quantised)} tensors, {quantised[0]!r} the first, belong to quantised weights. "
            "Those in a bitmask format are not imported: they mean nothing without their scales, "
            "which an ordinary model does not apply; save the model dequantised"
        )
