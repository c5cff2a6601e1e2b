"""A local Hugging Face checkpoint: names, types, shapes, raw bytes. No element is converted.

Weights in a bitmask format of compressed-tensors appear as the dense tensors that they are, and
config.json as that of an ordinary model.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from tierd_layouts.errors import FormatError
from tierd_layouts.safetensors_file import read_header
from tierd_tools.bitmask_config import config_text, without_compression
from tierd_tools.bitmask_import import recognise
from tierd_tools.errors import CheckpointError, CheckpointMissing
from tierd_tools.source_tensor import FileTensor, SourceTensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Checkpoint", "SourceTensor", "control_file_names"]

CONFIG = "config.json"
SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
PACK_INDEX = "tierd.json"
#: member of `metadata` that says what was decoded or left out
IMPORT_NOTE = "tierd.import"

_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
_CONTROL = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "tokenizer*", "vocab.*"),
    *("README*", "LICENSE*", "NOTICE*"),
)
_NOT_CONTROL = (*_WEIGHTS, "*.safetensors", "*.index.json", PACK_INDEX)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose headers were read and agree with each other and with the files' sizes.

    imported: what was decoded and what config.json lost with it, for a person; mostly empty.
    """

    path: Path
    shards: tuple[Path, ...]
    tensors: Mapping[str, SourceTensor]
    metadata: Mapping[str, str]
    control_files: tuple[Path, ...]
    imported: str = ""
    config: bytes | None = None  #: replaces config.json where that is not about these weights

    @classmethod
    def open(cls, model_dir: str | os.PathLike[str]) -> Checkpoint:
        """Raises CheckpointMissing or CheckpointError, by the name of what is wrong."""
        path = Path(model_dir)
        files = plain_files(path)
        if PACK_INDEX in files:
            raise CheckpointError(f"{path} is a tierd pack already ({PACK_INDEX}); unpack it first")
        if CONFIG not in files:
            raise CheckpointMissing(f"{path} has no {CONFIG}: not a Hugging Face model folder")
        config = read_config(path / CONFIG)
        weight_map = _weight_map(path, files)
        stored: dict[str, FileTensor] = {}
        metadata: dict[str, str] = {}
        shards = tuple(path / name for name in sorted(set(weight_map.values())))
        for shard in shards or (path / SINGLE_FILE,):
            for name, text in _read_shard(shard, stored).items():
                metadata.setdefault(name, text)
        _check_weight_map(path, weight_map, stored)
        if not stored:
            raise CheckpointError(f"{path} has no tensors")
        recognised = recognise(stored)
        ordinary = without_compression(
            config, decoded=bool(recognised.formats), where=str(path / CONFIG)
        )
        imported = _import_note(recognised.text(), config, ordinary)
        if imported:
            metadata[IMPORT_NOTE] = imported
        return cls(
            path=path,
            shards=shards or (path / SINGLE_FILE,),
            tensors=recognised.tensors,
            metadata=metadata,
            control_files=tuple(path / name for name in control_file_names(files)),
            imported=imported,
            config=None if ordinary is None else config_text(ordinary),
        )

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def fingerprint(self) -> str:
        """Changes when a file is replaced, rewritten or touched. Reads no tensor.

        Good on one machine only, to tell whether a stopped job may go on; what a pack says about
        its source is a digest of the content.
        """
        digest = xxhash.xxh3_128()
        for file in (*self.shards, *self.control_files):
            try:
                stat = file.stat()
            except OSError as error:
                raise CheckpointError(f"{file}: {error.strerror}") from error
            fields = (file.name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
            digest.update(repr(fields).encode())
        return digest.hexdigest()


def control_file_names(names: Iterable[str]) -> list[str]:
    """Those of `names` that go with a model as they are: configuration, tokenizer, documents."""

    def matches(name: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    return sorted(n for n in names if matches(n, _CONTROL) and not matches(n, _NOT_CONTROL))


def plain_files(path: Path) -> frozenset[str]:
    try:
        with os.scandir(path) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except FileNotFoundError as error:
        raise CheckpointMissing(f"{path} does not exist") from error
    except NotADirectoryError as error:
        raise CheckpointError(f"{path} is not a directory") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def read_config(path: Path) -> dict[str, Any]:
    """No model can be built from a pack whose config.json is not a JSON object."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a JSON object")
    return config


def read_json(path: Path) -> object:
    """Whatever it holds. Raises CheckpointError."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def _import_note(
    decoded: str, config: Mapping[str, Any], ordinary: Mapping[str, Any] | None
) -> str:
    notes = [decoded] if decoded else []
    if ordinary is not None:
        removed = ", ".join(sorted(config.keys() - ordinary.keys()))
        why = "" if decoded else ", which claimed sparse tensors: they are dense"
        notes.append(f"{CONFIG} without {removed}{why}")
    return "; ".join(notes)


def _weight_map(path: Path, files: frozenset[str]) -> dict[str, str]:
    """{tensor: shard} of a checkpoint; {} for a single file, which transformers prefers."""
    if SINGLE_FILE in files:
        return {}
    if SHARD_INDEX not in files:
        others = sorted(n for n in files for p in (*_WEIGHTS, "*.safetensors") if fnmatchcase(n, p))
        found = f"only {', '.join(others[:4])}" if others else "no weights at all"
        advice = "; convert them to safetensors first" if others else ""
        raise CheckpointMissing(
            f"{path} has neither {SINGLE_FILE} nor {SHARD_INDEX}, {found}{advice}"
        )
    try:
        weight_map = json.loads((path / SHARD_INDEX).read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path / SHARD_INDEX} is not a shard index: {error!r}") from error
    except OSError as error:
        raise CheckpointError(f"{path / SHARD_INDEX}: {error.strerror}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / SHARD_INDEX}: weight_map is not a map, or empty")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path / SHARD_INDEX}: tensor {name!r} is in {shard!r}, "
                "which is not the name of a safetensors file in this folder"
            )
    missing = sorted(set(weight_map.values()) - files)
    if missing:
        raise CheckpointMissing(
            f"{path}: {len(missing)} of {len(set(weight_map.values()))} shards that {SHARD_INDEX} "
            f"names are missing: {', '.join(missing[:4])}"
        )
    return weight_map


def _read_shard(shard: Path, tensors: dict[str, FileTensor]) -> Mapping[str, str]:
    """Adds the tensors of `shard`; returns its metadata."""
    try:
        header = read_header(shard)
    except FormatError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{shard}: {error.strerror}") from error
    for name, entry in header.entries.items():
        if name in tensors:
            raise CheckpointError(
                f"tensor {name!r} is in two shards: {tensors[name].path.name} and {shard.name}"
            )
        begin, nbytes = header.data_start + entry.begin, entry.end - entry.begin
        tensors[name] = FileTensor(name, entry.dtype, entry.shape, shard, begin, nbytes)
    return header.metadata


def _check_weight_map(
    path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, FileTensor]
) -> None:
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise CheckpointError(
                f"{path / SHARD_INDEX} says that tensor {name!r} is in {shard}, which has it not"
            )
