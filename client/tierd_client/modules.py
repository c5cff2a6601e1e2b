"""Modules whose weights live in leases: linears with a forward of their own, and sites.

A *site* is a module whose forward runs inside one layer's lease, a decoder layer for example. It is
entered and left by torch's own hooks on that one instance; no class and no forward is replaced.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from tierd_client.eager import eager
from tierd_client.errors import LeaseLost, UnsupportedOperation, ViewStillAlive

if TYPE_CHECKING:
    from tierd_client.compute import Arithmetic
    from tierd_client.lease import Lease
    from tierd_client.leasing import LayerLeases
    from tierd_client.names import Stored


class PackedLinear(nn.Linear):
    """An nn.Linear whose weight is in the arena; `weight` is on meta: shape and dtype only."""

    _arithmetic: Arithmetic
    _stored: Stored

    @classmethod
    def replacing(cls, linear: nn.Linear, stored: Stored, arithmetic: Arithmetic) -> PackedLinear:
        """A module with all of `linear`'s state, its hooks too, that multiplies by `stored`."""
        packed = cls.__new__(cls)
        packed.__dict__.update(linear.__dict__)
        packed._stored = stored
        packed._arithmetic = arithmetic
        return packed

    @eager
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._arithmetic.linear(self._stored, input, self.bias)

    def extra_repr(self) -> str:
        tensor = self._stored.tensor
        return f"{super().extra_repr()}, {tensor.name}: {tensor.codec}"

    def _apply(self, fn: Any, recurse: bool = True) -> NoReturn:
        raise UnsupportedOperation(
            f"moving or converting (.to, .cuda, .half, .float, ...) {self._stored.name!r} is "
            "refused: the weight is in memory that tierd shares between processes"
        )

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse_copy(self._stored.name)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_copy(self._stored.name)


def _refuse_copy(name: str) -> NoReturn:
    raise UnsupportedOperation(
        f"copying or pickling {name!r} is refused: its weights are in memory that tierd shares "
        "between processes; load the model again, also in another process"
    )


@dataclass(frozen=True, slots=True)
class Bound:
    """A dense-stored parameter that a module reads itself (an embedding): set for each forward."""

    module: nn.Module
    attribute: str
    stored: Stored
    outside: nn.Parameter  # the meta tensor between forwards

    def bind(self, lease: Lease) -> None:
        """Show the arena's bytes, without a copy."""
        view = lease[self.stored.name].view()
        self.module._parameters[self.attribute] = nn.Parameter(view, requires_grad=False)

    def unbind(self) -> None:
        self.module._parameters[self.attribute] = self.outside


@dataclass(frozen=True, slots=True)
class Copied:
    """A vector or scalar (norm, bias, buffer) that gets private memory when first leased."""

    module: nn.Module
    attribute: str
    stored: Stored
    dtype: torch.dtype

    def copy(self, lease: Lease) -> int:
        """Fill it in, converted as transformers' loader would; returns the bytes."""
        tensor = lease[self.stored.name].dense().to(self.dtype)
        if self.attribute in self.module._buffers:
            self.module._buffers[self.attribute] = tensor
        else:
            self.module._parameters[self.attribute] = nn.Parameter(tensor, requires_grad=False)
        return tensor.nbytes


class Stack(threading.local):
    """The sites of one model that a thread is inside, outermost first."""

    def __init__(self) -> None:
        self.sites: list[Site] = []


class Site:
    """A module whose forward runs inside the lease of `layer`.

    bound: parameters to set for its duration; copied: to fill in when it is first entered.
    enclosing: the site whose module contains this one. stack: shared by the sites of a model.
    """

    def __init__(
        self, name: str, module: nn.Module, layer: int, leases: LayerLeases, stack: Stack
    ) -> None:
        self.name = name
        self.layer = layer
        self.bound: list[Bound] = []
        self.copied: list[Copied] = []
        self.copied_bytes = 0
        self.enclosing: Site | None = None
        self._leases = leases
        self._stack = stack
        self._lock = threading.Lock()
        self._users = 0
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, always_call=True)

    def __repr__(self) -> str:
        return f"<Site {self.name or 'model'}: layer {self.layer}>"

    def __deepcopy__(self, memo: Any) -> NoReturn:
        _refuse_copy(self.name)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        _refuse_copy(self.name)

    @eager
    def _before(self, module: nn.Module, args: Any) -> None:
        sites = self._stack.sites
        # torch calls no hook after a KeyboardInterrupt: what it cut short is left now.
        while sites and sites[-1] is not self.enclosing:
            sites.pop()._leave(failed=True)
        lease = self._leases.enter(self.layer)
        try:
            with self._lock:
                while self.copied:
                    self.copied_bytes += self.copied[-1].copy(lease)
                    self.copied.pop()
                if not self._users:
                    for bound in self.bound:
                        bound.bind(lease)
                self._users += 1
        except BaseException:
            self._unbind_unused()
            self._leases.leave(self.layer)
            raise
        sites.append(self)

    @eager
    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        sites = self._stack.sites
        if sites and sites[-1] is self:  # else `_before` failed
            sites.pop()
            self._leave(failed=output is None)

    def _leave(self, *, failed: bool) -> None:
        with self._lock:
            self._users -= 1
        self._unbind_unused()
        try:
            self._leases.leave(self.layer)
        except (LeaseLost, ViewStillAlive):
            # An exception is on its way: its traceback holds views, and nothing is computed with.
            if not failed:
                raise

    def _unbind_unused(self) -> None:
        with self._lock:
            if not self._users:
                for bound in self.bound:
                    bound.unbind()
