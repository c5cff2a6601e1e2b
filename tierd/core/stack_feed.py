"""What one GPU takes of one model out of DRAM: a pseudo-client of the DRAM machine.

Its reserve there is the largest layer of the model, so whatever the GPU asks for can be read, one
layer at a time, whoever holds what. Its plan is that of the first client of the model on the GPU,
less what stays on the GPU: those layers have no next use in DRAM and may leave it.

A layer *stays* when it was on the GPU for a whole pass of that client without being copied. That
needs no knowledge of the GPU's policy, and is never wrong for longer than a pass. Where everything
fits on the GPU, clients keep their leases and ask no more: then what is there stays at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from dataclasses import replace as replaced
from typing import TYPE_CHECKING

from tierd.core.model import DEFAULT_WEIGHT, Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd.core.model import Read
    from tierd.core.residency import Slot


@dataclass(slots=True, eq=False)
class Copying:
    """A copy, or a read past DRAM, under way into a slot of the GPU: the GPU's read that it fills,
    and what keeps its source in DRAM."""

    read: Read
    lease: int | None = None  #: in DRAM
    request: int | None = None  #: at DRAM, of an early copy until it has the lease
    source: Slot | None = None  #: in DRAM, of an early copy
    broken: bool = False  #: the read of its source failed


@dataclass(slots=True, eq=False)
class Feed:
    """One pseudo-client. Ids of feeds are negative."""

    id: int
    gpu: int
    model: int
    layer_bytes: Sequence[int]
    direct: bool = False  #: what DRAM has not is read past it: no plan and no reserve there
    open: bool = False  #: the DRAM machine has granted its reserve, if it needs one
    joined: bool = False  #: it is a client of DRAM; a direct one only while it holds something
    waiting: dict[int, Plan] = field(default_factory=dict)  #: by client: plans until it is open
    offered: dict[int, Plan] = field(default_factory=dict)  #: by client: not yet answered by a GPU
    users: dict[int, Plan] = field(default_factory=dict)  #: by client: admitted, oldest first
    weights: dict[int, int] = field(default_factory=dict)  #: of users, by client
    weight: int = DEFAULT_WEIGHT  #: that DRAM knows
    parked: list[tuple[int, Read]] = field(default_factory=list)  #: heap by number
    asking: dict[int, tuple[int, Read]] = field(default_factory=dict)  #: by request, at DRAM
    filling: dict[int, Copying] = field(default_factory=dict)  #: by request: early copies
    orphans: set[int] = field(default_factory=set)  #: requests at DRAM whose early copies failed
    copying: dict[int, Copying] = field(default_factory=dict)  #: by slot of the GPU, early ones too
    full: bool = False  #: DRAM has no more room for it until one of its copies ends
    #: layers in slots of the GPU, with the pass of the leader in which they were copied
    on_gpu: dict[int, int] = field(default_factory=dict)
    passes: int = 0
    declared: Plan | None = None  #: what DRAM was told last
    declared_for: Plan | None = None  #: the leader's plan that it came from
    _steps: int = 0  #: layers that the leader asked for in this pass
    _last_asked: int | None = None
    _last_read: int | None = None

    def __post_init__(self) -> None:
        self.open = self.direct

    @property
    def holds(self) -> bool:
        """Whether it has leases or requests in DRAM."""
        return bool(self.asking or self.filling or self.orphans) or any(
            copying.lease is not None for copying in self.copying.values()
        )

    @property
    def busy(self) -> bool:
        """Whether it holds something in DRAM, or writes to the GPU."""
        return bool(self.asking or self.orphans or self.copying)

    def asked_for(self, request: int) -> bool:
        """Whether the request is one for a layer that DRAM has not answered."""
        return request in self.asking or request in self.filling or request in self.orphans

    @property
    def weight_now(self) -> int:
        """Its share of the disk: that of all who need what it brings, as if each asked DRAM."""
        return sum(self.weights.values()) or DEFAULT_WEIGHT

    @property
    def leader(self) -> int | None:
        return next(iter(self.users), None)

    @property
    def idle(self) -> bool:
        """Nobody needs it now; a request may still wait on the GPU."""
        return not (self.users or self.waiting or self.offered or self.parked or self.busy)

    # ------------------------------------------------------------------------------------- passes

    def reading(self, read: Read) -> None:
        """The GPU has a slot for this layer."""
        self.on_gpu[read.key.layer] = self.passes
        self._last_read = read.key.layer

    def asked(self, client: int, layer: int) -> bool:
        """A client asked the GPU for a layer; True when that ended a pass of the leader."""
        if client != self.leader or layer == self._last_asked:
            return False
        self._last_asked = layer
        self._steps += 1
        if self._steps < len(self.users[client].order):
            return False
        self._steps = 0
        self.passes += 1
        return True

    def all_stays(self) -> None:
        """What is on the GPU stays there."""
        for layer in self.on_gpu:
            self.on_gpu[layer] = self.passes - 2

    def _stays(self, layer: int) -> bool:
        return self.on_gpu.get(layer, self.passes) < self.passes - 1

    # --------------------------------------------------------------------------------------- plan

    def plan(self, at_ns: int, request: int) -> Plan:
        """What to declare in DRAM now."""
        every = tuple(range(len(self.layer_bytes)))
        leader = self.leader
        if leader is None:
            return Plan(at_ns, self.id, request, self.model, self._smallest(every), "once", 1,
                beside=every,
            )  # fmt: skip
        plan = self.users[leader]
        order = plan.order
        if plan.kind == "cyclic" and self._last_read in order:
            start = order.index(self._last_read) + 1
            order = order[start:] + order[:start]
        order = tuple(layer for layer in order if not self._stays(layer))
        return replaced(
            plan,
            at_ns=at_ns,
            client=self.id,
            request=request,
            order=order or self._smallest(plan.order),
            beside=every,
        )

    def _smallest(self, layers: Sequence[int]) -> tuple[int, ...]:
        """A plan has at least one layer; this one keeps least in DRAM."""
        return (min(layers, key=lambda layer: self.layer_bytes[layer]),)

    def declares(self, plan: Plan) -> bool:
        """Whether DRAM has to be told: the plan has another source or other layers than before."""
        source = None if self.leader is None else self.users[self.leader]
        old = self.declared
        if old is not None and self.declared_for is source and set(old.order) == set(plan.order):
            return False
        self.declared, self.declared_for = plan, source
        return True
