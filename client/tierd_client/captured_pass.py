"""A pass of a model that a GPU repeats by itself: its inputs, its cache, its leases, its result."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from tierd_client.decode_calls import CACHE, DecodeCall, cache_form, cache_tensors
from tierd_client.errors import UnsupportedOperation

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_client.compute import Arithmetic
    from tierd_client.device_leasing import DeviceLeases
    from tierd_client.lease_hold import LeaseHold
    from tierd_client.streams import Graph, Streams


class CapturedPass:
    """One graph. It reads its inputs from, and writes its cache and its result to, the same memory
    each time; the leases of all layers are held while it lives. Not thread-safe.

    Capturing computes nothing. Raises UnsupportedOperation for a pass that cannot be captured.
    """

    def __init__(
        self,
        call: DecodeCall,
        run: Callable[..., Any],
        hold: LeaseHold,
        leases: DeviceLeases,
        arithmetic: Arithmetic,
        streams: Streams,
    ) -> None:
        self.key = call.key
        #: When it was last used, in decoding passes of the model.
        self.used_at = 0
        self._streams = streams
        self._hold = hold
        self._mark = streams.event()
        self._stream: Any = None
        self._inputs = {name: tensor.clone() for name, tensor in call.tensors.items()}
        self._cache_tensors = [cache_tensors(layer) for layer in call.cache.layers]
        self._cache_form = cache_form(call.cache)
        self._cache = weakref.ref(call.cache)

        def once() -> Any:
            return run(**self._inputs, **call.others, **{CACHE: call.cache})

        with leases.frozen(hold), arithmetic.capturing() as self.work:
            try:
                graph, output = streams.captured(once)
            except RuntimeError as error:  # what CUDA and torch raise
                raise UnsupportedOperation(
                    f"graphs=True: this pass of the model cannot be captured ({error}); load it "
                    "without graphs"
                ) from error
        self._graph: Graph | None = graph
        self._output = _without(output, call.cache)

    def takes(self, call: DecodeCall) -> bool:
        """Whether it is of this kind, and nobody else has the cache that it computed with."""
        if self.key != call.key:
            return False
        before = self._cache()
        return before is call.cache or (
            before is None and self._cache_form == cache_form(call.cache)
        )

    def replay(self, call: DecodeCall) -> Any:
        """The result of `call`, once this thread's stream is through. Raises LeaseLost."""
        self._hold.check()
        stream = self._streams.current()
        if self._stream is not None and self._stream != stream:
            # Behind all that was given there: passes without the graph may have used the cache too.
            self._mark.record(self._stream)
            stream.wait_event(self._mark)
        for name, tensor in call.tensors.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        self._adopt(call.cache)
        assert self._graph is not None, "it has ended"
        self._graph.replay()
        result = _cloned(self._output, call.cache)
        self._mark.record(stream)
        self._stream = stream
        return result

    def end(self) -> None:
        """Wait for its last replay, and give the leases back. Raises LeaseLost."""
        try:
            if self._stream is not None:
                self._mark.synchronize()
        finally:
            self._graph = self._output = None  # before anything that they have the addresses of
            self._hold.end()

    def _adopt(self, cache: Any) -> None:
        """Have `cache` be the memory that the graph knows, with what is in it now: it is another
        one, or its tensors were replaced, as beams do."""
        for layer, (keys, values, length) in zip(cache.layers, self._cache_tensors, strict=True):
            if layer.keys is not keys:
                layer.keys = keys.copy_(layer.keys)
            if layer.values is not values:
                layer.values = values.copy_(layer.values)
            if layer.cumulative_length is not length:
                layer.cumulative_length = length.copy_(layer.cumulative_length)
        if self._cache() is not cache:
            self._cache = weakref.ref(cache)


class _TheCache:
    """Stands in a result for the cache of the call."""


def _without(output: Any, cache: Any) -> Any:
    return _mapped(output, lambda leaf: _TheCache if leaf is cache else leaf)


def _cloned(output: Any, cache: Any) -> Any:
    def clone(leaf: Any) -> Any:
        if leaf is _TheCache:
            return cache
        return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf

    return _mapped(output, clone)


def _mapped(output: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(output, dict):  # a ModelOutput too
        return type(output)(**{name: _mapped(value, change) for name, value in output.items()})
    if isinstance(output, (tuple, list)):
        return type(output)(_mapped(value, change) for value in output)
    return change(output)
