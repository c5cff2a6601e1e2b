"""What three tiers add to the vocabulary of one (`model`): GPUs, copies to them, fences.

A GPU is a number, its index in `StackConfig.gpus`. Arena ids are unique over all tiers. A client
lives on one tier: the slot, arena and offset of its `Grant` are of that tier; a slot or lease id is
unique within its tier only.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierd.core.model import DEFAULT_WEIGHT, Action, CoreConfig, Event, LayerKey


@dataclass(frozen=True, slots=True)
class StackConfig:
    """The limits of each tier. `reads_in_flight` of a GPU: its copies that may run at once."""

    dram: CoreConfig
    gpus: tuple[CoreConfig, ...]
    early: bool = False  #: copies start while their layer is still being read (`Copy.filling`)
    direct: tuple[bool, ...] = ()  #: by GPU: what DRAM has not is read past it; (): nowhere

    def is_direct(self, gpu: int) -> bool:
        return bool(self.direct) and self.direct[gpu]


# --------------------------------------------------------------------------------------------------
# Events


@dataclass(frozen=True, slots=True)
class GpuArenaAdded:
    """As `ArenaAdded`, in the memory of a GPU."""

    at_ns: int
    gpu: int
    arena: int
    span_bytes: int
    warm_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelPlaced:
    """Clients on `gpu` may ask for the model from now on; its layers go to `arena` there."""

    at_ns: int
    gpu: int
    model: int
    arena: int


@dataclass(frozen=True, slots=True)
class JoinedGpu:
    """As `ClientJoined`: its leases will be of slots on `gpu`. `client` is not negative."""

    at_ns: int
    client: int
    gpu: int
    weight: int = DEFAULT_WEIGHT


@dataclass(frozen=True, slots=True)
class CopyDone:
    """The GPU slot holds its layer, verified; the DRAM slot is not read any more. Answers a
    `DirectRead` too. For a copy that is filling it comes after the `ReadDone` of its source."""

    at_ns: int
    gpu: int
    slot: int


@dataclass(frozen=True, slots=True)
class CopyFailed:
    """Nothing writes to the GPU slot or reads the DRAM slot any more. `code` and `text` go to
    everybody who waits for the layer on this GPU, unchanged. Where the read of the source failed,
    this comes after its `ReadFailed`, with the same code and text."""

    at_ns: int
    gpu: int
    slot: int
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Fenced:
    """The context of a client of a GPU that is gone is gone too: nothing reads its slots any more.
    Every `ClientGone` of such a client is followed by one, at once or after a grace period."""

    at_ns: int
    client: int


@dataclass(frozen=True, slots=True)
class TierBudgetChanged:
    """As `BudgetChanged`, for one tier. `gpu`: None is DRAM. The `request`s of all commands come
    from one counter: their answers do not name a tier."""

    at_ns: int
    request: int
    gpu: int | None
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class GpuMeasured:
    """What copies to this GPU got lately, all of them together, while blocks were under way."""

    at_ns: int
    gpu: int
    bytes_per_s: int


StackEvent = (
    Event
    | GpuArenaAdded
    | ModelPlaced
    | JoinedGpu
    | CopyDone
    | CopyFailed
    | Fenced
    | TierBudgetChanged
    | GpuMeasured
)

# --------------------------------------------------------------------------------------------------
# Actions


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the layer from a DRAM slot, which stays as it is until this is answered, to a slot of
    the GPU; answer CopyDone or CopyFailed.

    `filling`: a `Read` that was returned earlier, or before this, is filling the DRAM slot. Copy
    what of it is verified, block by block. When that read fails the copy ends by itself: its slot
    in DRAM may then be filled with something else before this is answered.
    """

    gpu: int
    slot: int
    generation: int
    key: LayerKey
    arena: int
    offset: int
    nbytes: int
    from_slot: int
    from_arena: int
    from_offset: int
    reason: str  #: "demand" or "ahead"
    filling: bool = False


@dataclass(frozen=True, slots=True)
class StopCopy:
    """Nobody wants what a filling copy brings. Copy no more of it; it is answered when nothing
    writes to the GPU slot any more, with `CopyFailed`, or `CopyDone` where that was first. Its
    answer may be on the way already."""

    gpu: int
    slot: int


@dataclass(frozen=True, slots=True)
class DirectRead:
    """Fill the slot of the GPU from the disk, past DRAM, verified; answer CopyDone or CopyFailed.
    Only where `StackConfig.direct` says so."""

    gpu: int
    slot: int
    generation: int
    key: LayerKey
    arena: int
    offset: int
    nbytes: int
    reason: str  #: "demand" or "ahead"


@dataclass(frozen=True, slots=True)
class Unload:
    """The slot of the GPU is empty from now on, also after a copy that failed."""

    gpu: int
    slot: int
    generation: int
    key: LayerKey | None


StackAction = Action | Copy | StopCopy | DirectRead | Unload
