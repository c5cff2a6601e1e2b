"""Names: which stored tensor is which parameter of a transformers model.

Nothing here knows a model class. Checkpoint names are translated by transformers' own key
conversion, and the model is made by its own `from_pretrained`: it gets *placeholders* in place of
weights, one stored element repeated to the true shape by strides of zero, so that a model of any
size is made, tied and given its non-persistent buffers (rotary frequencies, ...) without memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierd_client.errors import UnsupportedModel
from tierd_client.tensors import torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from tierd_layouts.index import PackIndex, Tensor

#: A refusal lists this many names and counts the rest.
_LISTED = 8
#: Bit patterns 1..31743 are distinct numbers and no NaN in BF16, F16 and F32 alike.
_DISTINCT = 31743


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the pack and the layer (position in `index.layers`) that holds it."""

    layer: int
    tensor: Tensor

    @property
    def name(self) -> str:
        return self.tensor.name


def stored_tensors(index: PackIndex) -> dict[str, Stored]:
    """Every name of the checkpoint; an alias leads to the tensor that is stored."""
    tensors = {
        tensor.name: Stored(position, tensor)
        for position, layer in enumerate(index.layers)
        for tensor in layer.tensors
    }
    return tensors | {alias: tensors[name] for alias, name in index.aliases.items()}


def is_matrix(shape: tuple[int, ...]) -> bool:
    """True for what stays in the arena: more than one dimension above 1. The rest is copied."""
    return sum(size > 1 for size in shape) > 1


def checkpoint_renamer(skeleton: Any) -> Callable[[str], tuple[str, str | None]]:
    """A function from a checkpoint's name to (the model's name, the converter's pattern or None).

    skeleton: the model on the meta device. The pattern is of a conversion that computes (fuses,
    splits, transposes) instead of renaming. Follows `convert_and_load_state_dict_in_model`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state, prefix = skeleton.state_dict(), skeleton.base_model_prefix

    def rename(name: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        return renamed, pattern

    return rename


def map_checkpoint(skeleton: Any, stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The model's parameter and buffer names, each with its stored tensor.

    skeleton: the model on the meta device, in the dtype that it will compute in.
    Raises UnsupportedModel, with the list, for tensors that the model would have to convert, and
    for matrices that are stored in another dtype or shape than the model needs: they could not be
    read in place. Names that the model does not know are left to its own loader to report.
    """
    rename, state = checkpoint_renamer(skeleton), skeleton.state_dict()
    converted, mismatched, found = [], [], {}
    for name, tensor in stored.items():
        target, pattern = rename(name)
        if pattern is not None:
            converted.append(name)
        elif target in state:
            found[target] = tensor
            expected, shape = state[target], tensor.tensor.shape
            if tuple(expected.shape) != shape:
                mismatched.append(
                    f"{name} is {list(shape)}, the model's {target} {list(expected.shape)}"
                )
            elif is_matrix(shape) and torch_dtype(tensor.tensor.dtype) != expected.dtype:
                mismatched.append(f"{name} is {tensor.tensor.dtype}, the model {expected.dtype}")
    kind = type(skeleton).__name__
    if converted:
        raise UnsupportedModel(
            f"{kind}: transformers would have to fuse or split {_listing(converted)}; only weights "
            "that are used as they are stored (nn.Linear, embeddings, norms) can be served; "
            "mixture-of-experts layers come in a later version"
        )
    if mismatched:
        raise UnsupportedModel(
            f"{kind} needs other shapes or dtypes than the pack has: {_listing(mismatched)}; "
            "convert the checkpoint to the dtype of its config and pack it again"
        )
    return found


def placeholders(stored: Mapping[str, Stored]) -> dict[str, torch.Tensor]:
    """A state dict of the right shapes and dtypes that takes one element per tensor.

    Aliases share their placeholder, all others differ in value: transformers ties what the
    config says is tied only if the values agree.
    """
    import torch

    shared: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if tensor.name not in shared:
            shape, dtype = tensor.tensor.shape, torch_dtype(tensor.tensor.dtype)
            pattern = 1 + len(shared) % _DISTINCT
            bits = {2: torch.int16, 4: torch.int32}.get(dtype.itemsize)
            element = (
                torch.zeros(1, dtype=dtype)
                if bits is None
                else torch.full((1,), pattern, dtype=bits).view(dtype)
            )
            shared[tensor.name] = element.reshape([1] * len(shape)).expand(shape)
        shared.setdefault(name, shared[tensor.name])
    return {name: shared[name] for name in stored}


def check_loaded(
    model: Any, info: Mapping[str, Any], mapping: Mapping[str, Stored], made: Mapping[str, Any]
) -> None:
    """Raise UnsupportedModel, with the list, unless the loader did what `mapping` says.

    info: the loading info of `from_pretrained`; made: the placeholders that it was given. A matrix
    that is no longer its placeholder was converted by the loader (a dtype that the model class
    insists on, for example) and cannot be served in place.
    """
    kind = type(model).__name__
    for what, key in (("misses", "missing_keys"), ("has no place for", "unexpected_keys")):
        if info[key]:
            raise UnsupportedModel(f"{kind} {what} {_listing(sorted(info[key]))}")
    wrong = []
    for target, stored in mapping.items():
        tensor = model.get_parameter_or_buffer(target)
        if is_matrix(tuple(tensor.shape)):
            placeholder = made[stored.name]
            if tensor.data_ptr() != placeholder.data_ptr() or tensor.dtype != placeholder.dtype:
                wrong.append(f"{target} ({stored.tensor.dtype} stored, {tensor.dtype} needed)")
    if wrong:
        raise UnsupportedModel(f"{kind} converts weights while loading: {_listing(wrong)}")


def refuse_unfit(kind: str, unfit: list[str]) -> None:
    """Raise UnsupportedModel when `unfit` names any parameters, numbered ones grouped."""
    if unfit:
        groups: dict[str, list[str]] = {}
        for name in unfit:
            groups.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
        lines = [f"{group} (x{len(m)})" if len(m) > 1 else m[0] for group, m in groups.items()]
        raise UnsupportedModel(
            f"{kind} has weights that are not of an nn.Linear, an embedding or a norm: "
            f"{_listing(lines)}"
        )


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} ({', '.join(names[:_LISTED])}{more})"
