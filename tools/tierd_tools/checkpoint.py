"""A local Hugging Face checkpoint: names, types, shapes, raw bytes. Nothing is converted.

A tensor is read when it is asked for and its pages leave the page cache afterwards, so a pass over
a checkpoint needs the memory of one tensor, whatever the size of the whole.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from tierd_layouts.dtypes import ITEM_BYTES
from tierd_layouts.errors import FormatError
from tierd_layouts.safetensors_file import read_header
from tierd_tools.errors import CheckpointError, CheckpointMissing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

SINGLE_FILE = "model.safetensors"
SHARD_INDEX = "model.safetensors.index.json"
PACK_INDEX = "tierd.json"

_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")
_CONTROL = (
    *("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "tokenizer*", "vocab.*"),
    *("README*", "LICENSE*", "NOTICE*"),
)
_NOT_CONTROL = (*_WEIGHTS, "*.safetensors", "*.index.json", PACK_INDEX)
_READ_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of the checkpoint; `begin` is the offset of its bytes in `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    nbytes: int

    @property
    def elements(self) -> int:
        return self.nbytes // ITEM_BYTES[self.dtype]

    def read(self) -> NDArray[np.uint8]:
        """The bytes, in memory of their own. Raises CheckpointError when the file ends early."""
        data = np.empty(self.nbytes, np.uint8)
        self._read_into(data.data, self.begin)
        return data

    def read_bits(self) -> NDArray[np.unsignedinteger[Any]]:
        """The elements as unsigned integers of their width, in the tensor's shape."""
        return self.read().view(f"<u{ITEM_BYTES[self.dtype]}").reshape(self.shape)

    def sample_bits(self, nbytes: int) -> NDArray[np.unsignedinteger[Any]]:
        """Up to `nbytes` from the middle of the tensor, as unsigned integers."""
        item = ITEM_BYTES[self.dtype]
        size = min(nbytes, self.nbytes) // item * item
        data = np.empty(size, np.uint8)
        skipped = (self.nbytes - size) // 2 // item * item
        self._read_into(data.data, self.begin + skipped)
        return data.view(f"<u{item}")

    def _read_into(self, target: memoryview, offset: int) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from error
        try:
            done = 0
            while done < len(target):
                part = target[done : done + _READ_BYTES]
                count = os.preadv(descriptor, [part], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{self.path} ends at byte {offset + done}, "
                        f"tensor {self.name!r} at byte {self.begin + self.nbytes}"
                    )
                done += count
            os.posix_fadvise(descriptor, offset, len(target), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: reading tensor {self.name!r}: {error.strerror}"
            ) from error
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose headers were read and agree with each other and with the files' sizes."""

    path: Path
    shards: tuple[Path, ...]
    tensors: Mapping[str, SourceTensor]
    metadata: Mapping[str, str]
    control_files: tuple[Path, ...]

    @classmethod
    def open(cls, model_dir: str | os.PathLike[str]) -> Checkpoint:
        """Raises CheckpointMissing or CheckpointError, by the name of what is wrong."""
        path = Path(model_dir)
        files = _plain_files(path)
        if PACK_INDEX in files:
            raise CheckpointError(f"{path} is a tierd pack already ({PACK_INDEX}); unpack it first")
        if "config.json" not in files:
            raise CheckpointMissing(f"{path} has no config.json: not a Hugging Face model folder")
        _check_config(path / "config.json")
        weight_map = _weight_map(path, files)
        tensors: dict[str, SourceTensor] = {}
        metadata: dict[str, str] = {}
        shards = tuple(path / name for name in sorted(set(weight_map.values())))
        for shard in shards or (path / SINGLE_FILE,):
            for name, text in _read_shard(shard, tensors).items():
                metadata.setdefault(name, text)
        _check_weight_map(path, weight_map, tensors)
        if not tensors:
            raise CheckpointError(f"{path} has no tensors")
        return cls(
            path=path,
            shards=shards or (path / SINGLE_FILE,),
            tensors=tensors,
            metadata=metadata,
            control_files=tuple(path / name for name in control_file_names(files)),
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


def _plain_files(path: Path) -> frozenset[str]:
    try:
        with os.scandir(path) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except FileNotFoundError as error:
        raise CheckpointMissing(f"{path} does not exist") from error
    except NotADirectoryError as error:
        raise CheckpointError(f"{path} is not a directory") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _check_config(path: Path) -> None:
    """No model can be built from a pack whose config.json is not a JSON object."""
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a {type(config).__name__}, not a JSON object")


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


def _read_shard(shard: Path, tensors: dict[str, SourceTensor]) -> Mapping[str, str]:
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
        tensors[name] = SourceTensor(name, entry.dtype, entry.shape, shard, begin, nbytes)
    return header.metadata


def _check_weight_map(
    path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, SourceTensor]
) -> None:
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise CheckpointError(
                f"{path / SHARD_INDEX} says that tensor {name!r} is in {shard}, which has it not"
            )
