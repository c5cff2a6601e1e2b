"""A model that the daemon serves to this client: its control files, its index, its layers."""

from __future__ import annotations

import operator
import weakref
from time import perf_counter_ns
from typing import TYPE_CHECKING

from tierd_client import fork
from tierd_client.errors import (
    LayerNotFound,
    LeaseLimit,
    LeaseLost,
    ProtocolBroken,
)
from tierd_client.hints import hint_fields
from tierd_client.lease import Lease, PendingLease
from tierd_client.shared import integer, receive
from tierd_client.stored_matrices import StoredMatrices

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tierd_client.connection import Connection
    from tierd_client.gpu.arenas import GpuArenas
    from tierd_client.protocol import Reply
    from tierd_client.statistics import Counters
    from tierd_layouts.index import Layer, Tensor


class OpenedModel:
    """Made by `Client.open`. Thread-safe. `index` is the pack's; `files` its control files.

    may_keep: the daemon says in its slot table whether memory is short.
    """

    def __init__(
        self,
        name: str,
        connection: Connection,
        counters: Counters,
        epoch: int,
        reply: Reply,
        *,
        may_keep: bool = False,
        arenas: GpuArenas | None = None,
    ) -> None:
        self._life = fork.current()
        self._may_keep = may_keep
        #: Those of the connection's tier; None for DRAM.
        self.arenas = arenas
        self.name = name
        self.connection = connection
        self._counters = counters
        #: True after `close`: `Client.open` then makes a new one.
        self.closed = False
        shared = receive(name, connection, epoch, reply, arenas)
        self.files, self.index = shared.files, shared.index
        self.model_id, self.arena = shared.model_id, shared.arena
        self.table, self.mapping = shared.table, shared.memory
        self._populate = shared.populate
        #: Its packed matrices where they lie.
        self.matrices = StoredMatrices(self.mapping)
        self._numbers = {layer.name: number for number, layer in enumerate(self.index.layers)}

    def __repr__(self) -> str:
        return f"<OpenedModel {self.name}: {len(self.index.layers)} layers>"

    # -------------------------------------------------------------------------------------- layers

    def layer_index(self, name: str) -> int:
        """The number of a layer in `index.layers`. Raises LayerNotFound."""
        number = self._numbers.get(name)
        if number is None:
            raise self._no_layer(name)
        return number

    def _no_layer(self, layer: str | int) -> LayerNotFound:
        return LayerNotFound(
            f"model {self.name!r} has no layer {layer!r}; it has {len(self._numbers)}, "
            f"from {self.layer_name(0)!r} to {self.layer_name(-1)!r}",
            "not_found",
        )

    def layer_name(self, layer: int) -> str:
        """The name of layer number `layer`, for errors too: an unknown number is its own name."""
        layers = self.index.layers
        return layers[layer].name if -len(layers) <= layer < len(layers) else str(layer)

    def tensor_record(self, layer: Layer, name: str) -> Tensor | None:
        """How tensor `name`, or the one that it is an alias of, is stored in `layer`."""
        name = self.index.aliases.get(name, name)
        for record in layer.tensors:
            if record.name == name:
                return record
        return None

    def plan(
        self,
        order: Iterable[str | int] | None = None,
        *,
        kind: str = "cyclic",
        lookahead: int = 1,
        tokens_per_pass: int = 1,
    ) -> int:
        """Declare what will be asked for; returns the bytes that the daemon reserves for this
        client.

        order: layers by name or number; default: all, as the index has them. kind: "cyclic", the
        order again and again; "once"; "open", any of them at any time (see `hint`). lookahead:
        leases to hold ahead of the one in use. tokens_per_pass: a batch, or what a speculative pass
        verifies. Raises LayerNotFound, BudgetTooSmall.
        """
        items = range(len(self.index.layers)) if order is None else order
        reply = self.connection.call(
            "plan",
            model_id=self.model_id,
            order=[self._number(item) for item in items],
            kind=kind,
            lookahead=lookahead,
            tokens_per_pass=tokens_per_pass,
        )
        return integer(reply.fields, "minimum_bytes")

    def hint(
        self,
        layers: Iterable[str | int] | Mapping[str | int, float],
        *,
        steps: int = 1,
    ) -> None:
        """Say which layers of an open plan will be asked for `steps` steps from now; a mapping has
        the probability of each. Replaces what was said for the same `steps`. Returns at once: it is
        advice, dropped by a daemon that knows no such plan. Raises LayerNotFound, ValueError."""
        fields = hint_fields(layers, steps, self._known_number)
        self.connection.notify("hint", model_id=self.model_id, **fields)

    def _known_number(self, layer: str | int) -> int:
        number = self._number(layer)
        if not 0 <= number < len(self.index.layers):
            raise self._no_layer(number)
        return number

    def _number(self, layer: str | int) -> int:
        return self.layer_index(layer) if isinstance(layer, str) else operator.index(layer)

    def acquire(self, layer: str | int) -> Lease:
        """A lease of a layer by number or name, waiting until it is resident.

        Raises LayerNotFound, LeaseLimit, BudgetTooSmall, ChecksumMismatch, ReadFailed,
        ModelRemoved, LeaseLost, DaemonGone, DaemonTimeout.
        """
        number = self._number(layer)
        while True:
            try:
                return self._acquire(number)
            except LeaseLimit:
                # Room is made by what a GPU still works with.
                if not self.connection.departures.wait():
                    raise

    def _acquire(self, layer: int) -> Lease:
        request = self._submit(layer, ahead=False)
        begin = perf_counter_ns()
        try:
            reply = self.connection.wait_reply(request)
        finally:
            self.stalled(perf_counter_ns() - begin)
        refusal = reply.refusal
        if refusal is not None:
            raise refusal
        return self.granted(layer, reply)

    def acquire_ahead(self, layer: str | int) -> PendingLease:
        """Ask for a lease that is needed later; returns at once, nothing is waited for."""
        number = self._number(layer)
        self._counters.asked_ahead()
        return PendingLease(self, number, self._submit(number, ahead=True))

    def close(self) -> None:
        """Tell the daemon that no more layers will be asked for; again does nothing. Leases go on
        until they are released. Raises ForkedClient, Refused while requests are unanswered."""
        self.check_life()
        if self.connection.alive and not self.closed:
            self.closed = True
            self.connection.call("close", model_id=self.model_id)

    def _submit(self, layer: int, *, ahead: bool) -> int:
        if not 0 <= layer < len(self.index.layers):
            raise LayerNotFound(
                f"model {self.name!r} has no layer number {layer}; "
                f"it has 0 to {len(self.index.layers) - 1}",
                "not_found",
            )
        if self.arenas is not None:
            self.connection.departures.send()
            if not self.arenas.attended:
                self.arenas.attend(self.table.attention)
        fields = {"model_id": self.model_id, "layer": operator.index(layer), "ahead": ahead}
        return self.connection.submit("acquire", fields)

    # --------------------------------------------------------- what leases ask of their model

    @property
    def in_this_life(self) -> bool:
        """False in a child that was forked since."""
        return self._life is fork.current()

    def check_life(self) -> None:
        """Raise ForkedClient in a forked child."""
        if self._life is not fork.current():
            fork.check(self._life, f"model {self.name!r}")

    # A lease may be read to its end after the daemon died: it quarantines what is still held.
    check = check_life

    def check_connection(self) -> None:
        """Raise what a request would raise now: ForkedClient, DaemonGone, ClientClosed."""
        self.connection.check()

    def look(self) -> None:
        """As `check_connection`, after a look whether it has ended meanwhile."""
        self.connection.look()

    @property
    def pressed(self) -> bool:
        """Whether leases that nobody computes with should go back: others may want the memory.
        Always so with a daemon that does not say. One look into shared memory."""
        return not self._may_keep or self.table.pressed

    def stalled(self, ns: int) -> None:
        """Count time that a caller waited for a layer."""
        self._counters.stalled(ns)

    def put_off(self) -> None:
        """Count a request ahead that the daemon answered "later"."""
        self._counters.put_off()

    def lease_ended(self, lease: Lease) -> None:
        """Count the end of a lease."""
        self._counters.ended(lease.layer.nbytes)

    def granted(self, layer: int, reply: Reply) -> Lease:
        """The lease of a granting reply. Raises LeaseLost, ProtocolBroken."""
        fields, record = reply.fields, self.index.layers[layer]
        try:
            number = integer(fields, "lease")
            slot, generation = integer(fields, "slot"), integer(fields, "generation")
            offset, nbytes = integer(fields, "offset"), integer(fields, "bytes")
            if (
                fields.get("arena") != self.arena
                or nbytes != record.nbytes
                or offset % 8
                or not 0 <= offset <= self.mapping.nbytes - nbytes
            ):
                raise ProtocolBroken(
                    f"grant of {self.name}/{record.name} is {nbytes} bytes at {offset} of arena "
                    f"{fields.get('arena')!r}; the layer has {record.nbytes} and arena "
                    f"{self.arena} {self.mapping.nbytes}"
                )
            now = self.table.generation(slot)
            if now != generation:
                raise LeaseLost(
                    f"slot {slot} of {self.name}/{record.name} was granted with generation "
                    f"{generation} and holds {now}"
                )
        except LeaseLost:
            self.connection.release([number])
            raise
        except ProtocolBroken as error:
            self.connection.fail(error)
            raise
        try:
            self._populate(offset, nbytes)
        except BaseException:
            self.connection.release([number])
            raise
        self._counters.granted(nbytes)
        lease = Lease(
            self,
            record,
            self.mapping,
            lease=number,
            slot=slot,
            generation=generation,
            offset=offset,
        )
        self.connection.held[number] = weakref.ref(lease)
        self.connection.check()  # closed meanwhile: the grant may be given back already
        return lease
