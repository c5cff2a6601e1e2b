"""What the machine reports about itself: immutable, exact, taken between two events."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """Bytes. `used` counts every granule with memory behind it, occupied or not."""

    budget_bytes: int
    used_bytes: int
    peak_bytes: int
    resident_bytes: int
    leased_bytes: int
    in_flight_bytes: int
    quarantined_bytes: int
    reserved_bytes: int  #: what admission has promised to all clients
    discarding_bytes: int


@dataclass(frozen=True, slots=True)
class Counters:
    """Since the machine was made."""

    grants: int = 0
    hits: int = 0  #: acquires that were granted at once
    misses: int = 0  #: acquires that had to wait for a read
    later: int = 0
    refusals: int = 0
    reads: int = 0  #: reads that were started
    reads_ahead: int = 0  #: of them, without a request
    read_bytes: int = 0  #: of reads that are done
    reads_failed: int = 0
    evictions: int = 0
    discards: int = 0
    stall_ns: int = 0


@dataclass(frozen=True, slots=True)
class ClientSnapshot:
    """One client. `model` and `position` are of its plan, None without one."""

    client: int
    model: int | None
    position: int | None  #: index into the plan's order of the layer that was asked for last
    leases: int
    leased_bytes: int  #: what its leases and accepted requests are charged with
    waiting: int  #: open requests
    reserved_bytes: int
    stall_ns: int
    granted: int


@dataclass(frozen=True, slots=True)
class LayerSnapshot:
    """One layer of a model."""

    layer: int
    nbytes: int
    state: str  #: "absent", "reading" or "resident"
    leases: int
    slot: int | None
    generation: int | None
    next_use: int | None  #: steps until the client that needs it soonest, None if no plan has it


@dataclass(frozen=True, slots=True)
class Snapshot:
    memory: MemorySnapshot
    counters: Counters
    clients: tuple[ClientSnapshot, ...]
    models: dict[int, tuple[LayerSnapshot, ...]]  #: by model id
