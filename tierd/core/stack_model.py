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
    """The GPU slot holds its layer; the DRAM slot is not read any more."""

    at_ns: int
    gpu: int
    slot: int


@dataclass(frozen=True, slots=True)
class CopyFailed:
    """`code` and `text` go to everybody who waits for the layer on this GPU, unchanged."""

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


StackEvent = (
    Event
    | GpuArenaAdded
    | ModelPlaced
    | JoinedGpu
    | CopyDone
    | CopyFailed
    | Fenced
    | TierBudgetChanged
)

# --------------------------------------------------------------------------------------------------
# Actions


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy the layer from a DRAM slot, which stays as it is until this is answered, to a slot of
    the GPU; answer CopyDone or CopyFailed."""

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


@dataclass(frozen=True, slots=True)
class Unload:
    """The slot of the GPU is empty from now on, also after a copy that failed."""

    gpu: int
    slot: int
    generation: int
    key: LayerKey | None


StackAction = Action | Copy | Unload
