"""Names: what a model, a file in a pack, a layer and a tensor may be called."""

from __future__ import annotations

import re

from tierd_layouts.errors import NameRefused

#: Models and files of a pack. The first character keeps out hidden files and option lookalikes.
_COMPONENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MAX_TENSOR_NAME_BYTES = 1024
#: Stored tensors that only fill space begin with this; safetensors allows no holes.
PADDING_PREFIX = "__pad__."
#: Takes the place of a header entry in safetensors, so no tensor can have this name.
METADATA_NAME = "__metadata__"


def check_model_name(name: str) -> str:
    """Returns `name`. Raises NameRefused unless it is one safe path component of <= 128 bytes."""
    return _check_component("model", name)


def check_file_name(name: str) -> str:
    """Returns `name`. Raises NameRefused unless it is one safe path component of <= 128 bytes."""
    return _check_component("file", name)


def check_layer_name(name: str) -> str:
    """Returns `name`. Raises NameRefused for names that `check_tensor_name` refuses."""
    return _check_path("layer", name)


def check_tensor_name(name: str) -> str:
    """Returns `name`. Raises NameRefused.

    Refused: empty, above 1024 bytes of UTF-8, control characters (NUL too), `/`, `\\`, `..`, lone
    surrogates, and what a shard reserves for itself (`__metadata__`, `__pad__.`).
    """
    _check_path("tensor", name)
    if name == METADATA_NAME or name.startswith(PADDING_PREFIX):
        raise NameRefused(f"tensor name {name!r} is reserved inside a shard")
    return name


def layer_of(parameter_name: str) -> str:
    """Returns the layer that a parameter belongs to.

    `model.layers.3.mlp.up_proj.weight` is in `model.layers.3`: the path up to and including the
    first all-digit segment. `lm_head.weight` has none and is in its parent path, `lm_head`. A name
    without a parent is a layer of its own.
    """
    segments = parameter_name.split(".")
    for i, segment in enumerate(segments):
        if segment.isascii() and segment.isdigit():
            return ".".join(segments[: i + 1])
    return ".".join(segments[:-1]) or parameter_name


def _check_component(kind: str, name: str) -> str:
    # fullmatch, not `$`: `$` would let a trailing newline through.
    if not _COMPONENT.fullmatch(name) or ".." in name:
        raise NameRefused(
            f"{kind} name {name[:200]!r} is refused: allowed are 1 to 128 of A-Z a-z 0-9 . _ -, "
            f"the first a letter or digit, without '..' or '/'"
        )
    return name


def _check_path(kind: str, name: str) -> str:
    try:
        nbytes = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise NameRefused(f"{kind} name {name[:200]!r} is not valid Unicode") from error
    if not 0 < nbytes <= MAX_TENSOR_NAME_BYTES:
        raise NameRefused(
            f"{kind} name {name[:60]!r} has {nbytes} bytes, allowed are 1 to "
            f"{MAX_TENSOR_NAME_BYTES}"
        )
    if ".." in name or any(c in "/\\\x7f" or c < " " for c in name):
        raise NameRefused(
            f"{kind} name {name[:200]!r} is refused: '..', '/', '\\' and control characters are "
            f"not allowed"
        )
    return name
