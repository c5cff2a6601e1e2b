"""Calls of a model that decode one token of each row into a static cache: what a graph can repeat.

Everything that changes from call to call is in tensors: the inputs, and a `StaticCache`, which
counts its tokens on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tierd_client.errors import UnsupportedOperation

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

CACHE = "past_key_values"
_INPUTS = ("input_ids", "inputs_embeds")
_PLAIN = (bool, int, float, str, type(None))
_ADVICE = 'generate(..., cache_implementation="static") makes one that can be'


@dataclass(frozen=True, slots=True)
class DecodeCall:
    """Such a call. tensors: the inputs, by name; others: the arguments that are no tensors.

    key: calls with the same one, and the same form of cache, differ in contents of tensors only.
    """

    cache: Any
    tensors: dict[str, torch.Tensor]
    others: dict[str, Any]
    key: Hashable


def decode_call(arguments: Mapping[str, Any], attention: str = "") -> DecodeCall | None:
    """The call with these arguments; None when it is no decoding, or the first with its cache.

    attention: the model's implementation of it. Raises UnsupportedOperation for one that decodes
    in a way that no graph can repeat.
    """
    cache = arguments.get(CACHE)
    inputs = [arguments[name] for name in _INPUTS if arguments.get(name) is not None]
    if cache is None or len(inputs) != 1 or inputs[0].shape[1:2] != (1,):
        return None
    if not _fits(cache):
        return None
    tensors = {name: each for name, each in arguments.items() if isinstance(each, torch.Tensor)}
    others = {k: v for k, v in arguments.items() if k not in tensors and k != CACHE}
    for name, value in others.items():
        if not isinstance(value, _PLAIN):
            raise UnsupportedOperation(
                f"graphs=True: argument {name} is a {type(value).__name__}, a pass that is "
                "repeated as a graph takes tensors and plain values"
            )
    key = (
        attention,
        tuple((name, *_form(tensor)) for name, tensor in tensors.items()),
        tuple(others.items()),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(inputs[0].device.type),
    )
    return DecodeCall(cache, tensors, others, key)


def cache_form(cache: Any) -> Hashable:
    """Shapes and types of all that a static cache consists of."""
    return tuple(form for layer in cache.layers for form in map(_form, cache_tensors(layer)))


def cache_tensors(layer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a layer of a static cache consists of."""
    return layer.keys, layer.values, layer.cumulative_length


def _fits(cache: Any) -> bool:
    """False while there is nothing in the cache. Raises UnsupportedOperation."""
    from transformers.cache_utils import StaticCache, StaticLayer

    if type(cache) is not StaticCache:
        length = cache.get_seq_length()
        if not isinstance(length, int) or length > 0:
            raise UnsupportedOperation(
                f"graphs=True: a pass with a {type(cache).__name__} cannot be repeated as a graph, "
                f"it grows; {_ADVICE}"
            )
        return False
    strange = {type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer}
    if strange or cache.offloading:
        what = ", ".join(sorted(strange)) or "offloading"
        raise UnsupportedOperation(
            f"graphs=True: a static cache with {what} counts on the host, which a graph cannot"
        )
    return all(layer.is_initialized for layer in cache.layers)


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device, tensor.is_inference()
