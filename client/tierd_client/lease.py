"""A lease: the right to read one layer's slot, from a grant to its release."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Mapping as MappingABC
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Self

from tierd_client.errors import LeaseEnded, LeaseLost, TensorNotFound, ViewStillAlive
from tierd_client.tensors import PackedTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from tierd_client.memory import ArenaMemory, Fence
    from tierd_client.opened import OpenedModel
    from tierd_layouts.index import Layer


class Lease:
    """Named tensors of one layer, valid inside the context (or until `release`).

    `generation` is the slot's version stamp: it is compared when the lease begins and when it ends,
    and LeaseLost says that what was read in between is void.
    """

    def __init__(
        self,
        opened: OpenedModel,
        layer: Layer,
        mapping: ArenaMemory,
        *,
        lease: int,
        slot: int,
        generation: int,
        offset: int,
    ) -> None:
        self.opened = opened
        self.layer = layer
        self.mapping = mapping
        self.lease = lease
        self.slot = slot
        self.generation = generation
        self.offset = offset  # of the layer's bytes in the arena
        self._ended = False
        self._views: list[tuple[str, weakref.ref[Any]]] = []
        self._fences: list[Fence] = []  # behind the uses that ended

    def __repr__(self) -> str:
        state = "ended" if self._ended else f"slot {self.slot}, generation {self.generation}"
        return f"<Lease {self.opened.name}/{self.layer.name}: {state}>"

    # ------------------------------------------------------------------------------------- tensors

    def __getitem__(self, name: str) -> PackedTensor:
        """The tensor called `name` (an alias counts). Raises TensorNotFound, LeaseEnded."""
        self.check()
        record = self.opened.tensor_record(self.layer, name)
        if record is None:
            raise TensorNotFound(
                f"layer {self.opened.name}/{self.layer.name} has no tensor {name!r}; it has "
                + ", ".join(stored.name for stored in self.layer.tensors)
            )
        # Not kept here: a cycle would put off the release of a lease that is dropped.
        return PackedTensor(self, record)

    @property
    def tensors(self) -> MappingABC[str, PackedTensor]:
        """All tensors by their stored names."""
        return _Tensors(self)

    def track(self, name: str, exporter: Any) -> None:
        """Note a view whose storage holds `exporter`."""
        self._views.append((name, weakref.ref(exporter)))

    def check(self) -> None:
        """Raise LeaseEnded after the release, ForkedClient in a forked child."""
        self.opened.check()
        if self._ended:
            raise LeaseEnded(
                f"the lease of {self.opened.name}/{self.layer.name} has ended; "
                "its tensors exist inside the context only"
            )

    # ----------------------------------------------------------------------------------------- end

    def leave(self, *, fenced: bool = True) -> bool:
        """Note that a thread's use ends here: on a GPU, with what it was given to do until now.

        fenced: False where that is only captured, and another use of the lease goes on.
        Returns whether the lease may be kept for a later use: what was read is valid, no view is
        alive. Else `release` says what is wrong. A view in a reference cycle counts as alive here.
        """
        fence = self.mapping.fence() if fenced else None
        if fence is not None:
            self._fences = [*(other for other in self._fences if not other.passed()), fence]
        self._views = [view for view in self._views if view[1]() is not None]
        return not self._views and self.sound

    @property
    def where(self) -> str:
        """Model and layer, for errors."""
        return f"{self.opened.name}/{self.layer.name}"

    @property
    def sound(self) -> bool:
        """Whether the slot has had the layer since the grant. One look into shared memory."""
        return self.opened.table.generation(self.slot) == self.generation

    @property
    def ended(self) -> bool:
        """True once released; the tensors are then unreadable."""
        return self._ended

    def release(self) -> None:
        """End the lease; again does nothing.

        Raises LeaseLost when the slot changed under the lease, ViewStillAlive when a view is still
        alive: then the daemon is told only when the last view is gone, so that nobody ever reads
        another layer's bytes through it.
        """
        self.opened.check_life()
        problem = self.end()
        if problem is not None:
            raise problem

    def __enter__(self) -> Self:
        self.check()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.release()
            return
        # The user's exception goes on; its traceback often keeps views alive.
        problem = self.end() if self.opened.in_this_life else None
        if problem is not None:
            error.add_note(f"{type(problem).__name__}: {problem}")

    def __del__(self) -> None:
        # Dropped without a release. `release` of the connection may be called in a finalizer.
        if not self._ended and self.opened.in_this_life:
            self._ended = True
            self.opened.lease_ended(self)
            self._give_back(self._alive(), self.mapping.fence_all)

    def end(self, *, here: bool = True) -> LeaseLost | ViewStillAlive | None:
        """As `release`, returning what that would raise; does nothing in a forked child.

        here: the thread, and on a GPU its stream, that used the layer last ends its lease.
        """
        if self._ended or not self.opened.in_this_life:
            return None
        self._ended = True
        now = self.opened.table.generation(self.slot)
        if any(reference() is not None for _, reference in self._views):
            gc.collect()  # a view in a reference cycle is gone for its user
        alive = self._alive()
        names = sorted({name for name, _ in alive})
        self.opened.lease_ended(self)
        self._give_back(alive, self.mapping.fence if here else self.mapping.fence_all)
        if now != self.generation:
            return LeaseLost(
                f"the slot of {self.where} changed from generation {self.generation} to {now} "
                "while it was leased: what was computed with it is void"
            )
        if names:
            return ViewStillAlive(
                f"the lease of {self.where} ended while a view of {', '.join(names)} was alive: "
                "delete it, and what shares its storage, before leaving the context"
            )
        return None

    def _give_back(
        self, alive: list[tuple[str, Any]], make_fence: Callable[[], Fence | None]
    ) -> None:
        fences, fence = self._fences, None if self._fences else make_fence()
        if fence is not None:  # the use was not ended by `leave`: it ends here
            fences = [fence]
        if alive:
            _ReleaseLater(self, fences, [exporter for _, exporter in alive])
        else:
            self.opened.connection.departures.add(self.lease, fences)

    def _alive(self) -> list[tuple[str, Any]]:
        found = [(name, reference()) for name, reference in self._views]
        return [(name, exporter) for name, exporter in found if exporter is not None]


class _Tensors(MappingABC[str, PackedTensor]):
    """`lease.tensors`: the layer's tensors, made when they are asked for."""

    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    def __getitem__(self, name: str) -> PackedTensor:
        return self._lease[name]

    def __iter__(self) -> Iterator[str]:
        return (tensor.name for tensor in self._lease.layer.tensors)

    def __len__(self) -> int:
        return len(self._lease.layer.tensors)


class _ReleaseLater:
    """Gives a lease back when the last of its views dies. Held by the views' finalizers."""

    def __init__(self, lease: Lease, fences: list[Fence], exporters: list[Any]) -> None:
        self._connection = lease.opened.connection
        self._lease = lease.lease
        self._mapping = lease.mapping
        self._fences = fences
        self._left = len(exporters)
        self._gone = itertools.count(1)  # next() is atomic: views die in any thread
        for exporter in exporters:
            weakref.finalize(exporter, self._one_is_gone).atexit = False

    def _one_is_gone(self) -> None:
        fence = self._mapping.fence_all()  # the view was used until now, in any stream
        if fence is not None:
            self._fences.append(fence)
        if next(self._gone) == self._left:
            self._connection.departures.add(self._lease, self._fences)


class PendingLease:
    """A lease asked for ahead of its use; `resolve` collects it.

    Dropped or cancelled without `resolve`, its grant is given back when it arrives.
    """

    def __init__(self, opened: OpenedModel, layer: int, request: int) -> None:
        self._opened = opened
        self._layer = layer
        self._request = request
        self._finalizer = weakref.finalize(self, opened.connection.abandon_soon, request)
        self._finalizer.atexit = False

    def resolve(self) -> Lease:
        """The lease, waiting for it if need be; only once. When the daemon answered "later", asks
        again as an ordinary acquire. Raises what `acquire` raises, LeaseEnded after `cancel`."""
        opened = self._opened
        opened.check()
        if self._finalizer.detach() is None:
            raise LeaseEnded(
                f"the request for {opened.name}/{opened.layer_name(self._layer)} was resolved or "
                "cancelled before"
            )
        begin = perf_counter_ns()
        try:
            reply = opened.connection.wait_reply(self._request)
        finally:
            opened.stalled(perf_counter_ns() - begin)
        refusal = reply.refusal
        if refusal is not None:
            raise refusal
        if reply.fields.get("later"):
            opened.put_off()
            return opened.acquire(self._layer)
        return opened.granted(self._layer, reply)

    @property
    def granted(self) -> bool:
        """Whether `resolve` gives the lease without waiting for the daemon: its grant is here."""
        reply = self._opened.connection.peek(self._request) if self._finalizer.alive else None
        return reply is not None and reply.refusal is None and not reply.fields.get("later")

    def cancel(self) -> None:
        """Give the request up: its grant is released when it arrives. Again does nothing."""
        if self._finalizer.detach() is not None and self._opened.in_this_life:
            self._opened.connection.abandon(self._request)
