"""What runs came to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run came to."""

    seed: int
    events: int
    virtual_seconds: float
    layers: int  #: computed by all clients
    grants: int
    hits: int
    reads: int
    read_bytes: int
    discards: int
    evictions: int
    later: int
    refusals: int
    stall_seconds: float
    peak_bytes: int
    budget_bytes: int

    def __str__(self) -> str:
        ratio = self.hits / self.grants if self.grants else 0.0
        return (
            f"seed {self.seed}: {self.layers} layers in {self.virtual_seconds:.3f} s virtual, "
            f"{self.events} events, {self.grants} grants ({ratio:.0%} hits), "
            f"{self.reads} reads of {self.read_bytes / 2**20:.1f} MiB, stall "
            f"{self.stall_seconds:.3f} s, {self.evictions} evictions, {self.discards} discards, "
            f"{self.later} later, {self.refusals} refusals, peak "
            f"{self.peak_bytes / 2**20:.1f} of {self.budget_bytes / 2**20:.1f} MiB"
        )


@dataclass(frozen=True, slots=True)
class FleetSummary:
    """What a run came to."""

    seed: int
    events: int
    virtual_seconds: float
    clients: int  #: that ever came
    layers: int  #: computed by all
    grants: int
    reads: int
    read_bytes: int
    copies: int
    copy_bytes: int
    early: int  #: copies that began before their layer was whole
    stopped: int  #: of these: that were stopped, or whose read failed
    direct: int  #: reads past DRAM
    refusals: int
    failures: int  #: of reads and copies
    models: int  #: that were ever served
    budgets: int  #: changes of one
    kept: int  #: leases that were given back because somebody else needed room
    stall_seconds: float

    def __str__(self) -> str:
        return (
            f"seed {self.seed}: {self.events} events, {self.virtual_seconds:.3f} s virtual, "
            f"{self.clients} clients, {self.models} models, {self.layers} layers computed, "
            f"{self.grants} grants, {self.reads} reads of {self.read_bytes / 2**30:.1f} GiB, "
            f"{self.copies} copies of {self.copy_bytes / 2**30:.1f} GiB, {self.early} of them "
            f"early, {self.stopped} of these ended early, {self.direct} direct reads, "
            f"{self.failures} failures, "
            f"{self.refusals} refusals, {self.budgets} budgets, {self.kept} kept leases given "
            f"back, stall {self.stall_seconds:.1f} s"
        )
