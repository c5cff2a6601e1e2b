"""The vocabulary of the core: the events that it takes and the actions that it returns.

Every record is a frozen slotted dataclass; those of every request are `quickly_made`. Ids are
opaque integers: the shell maps a model id to a pack, an arena id to a memfd, a client id to a
connection. Bytes are exact, times are `at_ns` on one monotonic clock that the caller owns.
"""

from __future__ import annotations

from dataclasses import dataclass

from tierd.core.records import quickly_made

PLAN_KINDS = ("cyclic", "once", "open")
DEFAULT_WEIGHT = 100
OPERATOR = 0  #: the client of refusals to an operator; no connection has this id
CERTAIN_PPM = 1_000_000  #: a probability of one, in millionths

# --------------------------------------------------------------------------------------------------
# Configuration


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """Limits; only the budget may change while the machine runs."""

    #: bytes that all arenas together may hold, rounded down to granules, until a `BudgetChanged`
    budget_bytes: int
    granule_bytes: int = 2 << 20  #: unit of physical memory: one huge page, or one small page
    small_layer_bytes: int = 2 << 20  #: layers below this start on 4 KiB, others on a granule
    reads_in_flight: int = 2  #: reads that may run at once on one device
    slot_limit: int = 1 << 30  #: slots that may exist at once: entries of the slot table
    story_length: int = 50_000  #: events, actions and decisions that the record keeps
    admission_patience_ns: int = 2_000_000_000  #: for which a plan waits for leases of others
    convoy_wait_ns: int = 10_000_000_000  #: longest hold that brings clients into phase; 0: none
    first_generation: int = 1  #: after a restart: above every generation in the slot table
    first_lease: int = 1  #: after a restart: above every lease in the slot table


@quickly_made
@dataclass(frozen=True, slots=True, order=True)
class LayerKey:
    """One layer of one loaded pack. A replaced pack is a new `model`."""

    model: int
    layer: int

    def __str__(self) -> str:
        return f"{self.model}/{self.layer}"


# --------------------------------------------------------------------------------------------------
# Events


@dataclass(frozen=True, slots=True)
class ArenaAdded:
    """An arena of `span_bytes` address space exists; `[0, warm_bytes)` counts against the budget
    from now on, because the shell populates it in the background."""

    at_ns: int
    arena: int
    span_bytes: int
    warm_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelAdded:
    """A pack can be served. `layer_bytes[i]` is the size of layer `i`, a multiple of 4 KiB."""

    at_ns: int
    model: int
    name: str
    arena: int
    layer_bytes: tuple[int, ...]
    device: int = 0  #: opaque: what its layers are read from; `reads_in_flight` holds for each


@dataclass(frozen=True, slots=True)
class ModelRemoved:
    """No client will ask for this model again; its leases live on until they are released."""

    at_ns: int
    model: int


@dataclass(frozen=True, slots=True)
class ClientJoined:
    """`weight`: the client's share of a device that others want too, against their weights."""

    at_ns: int
    client: int
    weight: int = DEFAULT_WEIGHT


@dataclass(frozen=True, slots=True)
class WeightChanged:
    """`client` has another weight from now on. What was read for it before stays charged."""

    at_ns: int
    client: int
    weight: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What `client` will ask for of `model`; replaces its earlier plan.

    `kind`: "cyclic", `order` again and again; "once", `order` and then nothing; "open", any of the
    layers in `order` at any time, as `Hint`s say, or reuse does.
    """

    at_ns: int
    client: int
    request: int
    model: int
    order: tuple[int, ...]
    kind: str = "cyclic"  #: one of PLAN_KINDS
    lookahead: int = 1  #: leases that the client wants to hold ahead of the one it computes with
    tokens_per_pass: int = 1  #: a batch, or what a speculative pass verifies
    beside: tuple[int, ...] = ()  #: layers that it may ask for too: they count for its reserve only


@dataclass(frozen=True, slots=True)
class PlanOver:
    """`client` will not follow its plan over `model` any more, and needs no reserve for it; what it
    holds stays its own. Without such a plan nothing happens; one that waits is refused."""

    at_ns: int
    client: int
    model: int


@dataclass(frozen=True, slots=True)
class Hint:
    """`client` expects to ask for `layers` of its open plan over `model`, each with its probability
    in millionths, `steps` steps from now. Advice: without such a plan it is dropped. Replaces what
    it said about the same number of steps from now on."""

    at_ns: int
    client: int
    model: int
    layers: tuple[int, ...]
    probabilities_ppm: tuple[int, ...]
    steps: int = 1


@quickly_made
@dataclass(frozen=True, slots=True)
class Acquire:
    """`client` wants a lease; `ahead` marks one that it will not compute with yet."""

    at_ns: int
    client: int
    request: int
    key: LayerKey
    ahead: bool = False


@quickly_made
@dataclass(frozen=True, slots=True)
class Release:
    at_ns: int
    client: int
    lease: int


@dataclass(frozen=True, slots=True)
class ClientGone:
    """The connection closed or the process died: everything that it held ends now.

    `holder`: its leases end, but a device may still read their slots: these stay in quarantine
    under this id until `HolderGone` says that nobody does.
    """

    at_ns: int
    client: int
    holder: int | None = None


@dataclass(frozen=True, slots=True)
class ReadDone:
    """The slot holds its layer, verified."""

    at_ns: int
    slot: int


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """`code` and `text` go to everybody who waits for the layer, unchanged."""

    at_ns: int
    slot: int
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class DiscardDone:
    """The memory behind the range went back to the system."""

    at_ns: int
    arena: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class AdoptedSlot:
    """A slot found in the slot table of the previous daemon."""

    slot: int
    arena: int
    offset: int
    nbytes: int
    generation: int
    key: LayerKey | None  #: None: what it holds is served no more, or it was only half read
    holders: tuple[int, ...]  #: opaque ids of processes that held a lease on it


@dataclass(frozen=True, slots=True)
class Adopted:
    """The first event after a warm restart, before any client. Slots with holders are quarantined:
    never overwritten until every holder is gone; those with a key can be granted meanwhile."""

    at_ns: int
    slots: tuple[AdoptedSlot, ...]


@dataclass(frozen=True, slots=True)
class HolderGone:
    """A process that held leases of the previous daemon died, or no longer reads them."""

    at_ns: int
    holder: int


@dataclass(frozen=True, slots=True)
class DeviceMeasured:
    """What reads from `device` get at present (`cost`), and how many may run from now on."""

    at_ns: int
    device: int
    bytes_per_s: int
    latency_ns: int
    reads_in_flight: int


@dataclass(frozen=True, slots=True)
class Pin:
    """An operator wants these layers to be resident and to stay. Answered by Done or Refuse."""

    at_ns: int
    request: int
    keys: tuple[LayerKey, ...]


@dataclass(frozen=True, slots=True)
class Unpin:
    """These layers may be evicted again. Answered by Done."""

    at_ns: int
    request: int
    keys: tuple[LayerKey, ...]


@dataclass(frozen=True, slots=True)
class EvictNow:
    """An operator wants these layers to go, whoever needs them next. Answered by Done or Refuse."""

    at_ns: int
    request: int
    keys: tuple[LayerKey, ...]


@dataclass(frozen=True, slots=True)
class BudgetChanged:
    """An operator gives the arenas together another budget. Answered by Done or Refuse: nobody
    takes more than it from then on, and what is above it goes as fast as leases end."""

    at_ns: int
    request: int
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed. Send one now and then while plans are open: what waits too long is refused."""

    at_ns: int


Event = (
    ArenaAdded
    | ModelAdded
    | ModelRemoved
    | ClientJoined
    | WeightChanged
    | Plan
    | PlanOver
    | Hint
    | Acquire
    | Release
    | ClientGone
    | ReadDone
    | ReadFailed
    | DiscardDone
    | Adopted
    | HolderGone
    | DeviceMeasured
    | Pin
    | Unpin
    | EvictNow
    | BudgetChanged
    | Tick
)

# --------------------------------------------------------------------------------------------------
# Actions


@dataclass(frozen=True, slots=True)
class Read:
    """Fill `[offset, offset + nbytes)` with the layer; answer ReadDone or ReadFailed."""

    slot: int
    generation: int
    key: LayerKey
    arena: int
    offset: int
    nbytes: int
    reason: str  #: "demand" or "ahead"


@dataclass(frozen=True, slots=True)
class Evict:
    """The slot is empty from now on, also after a read that failed. Its memory stays warm."""

    slot: int
    generation: int
    key: LayerKey | None


@dataclass(frozen=True, slots=True)
class Discard:
    """Give the memory behind the range back to the system; answer DiscardDone."""

    arena: int
    offset: int
    nbytes: int


@quickly_made
@dataclass(frozen=True, slots=True)
class Grant:
    client: int
    request: int
    lease: int
    key: LayerKey
    slot: int
    generation: int
    arena: int
    offset: int
    nbytes: int
    waited_ns: int  #: from when the client had nothing else to compute with until now: its stall


@dataclass(frozen=True, slots=True)
class Later:
    """Not a failure: ask again without `ahead` when the layer is needed."""

    client: int
    request: int


@dataclass(frozen=True, slots=True)
class Admit:
    """The plan is accepted. `minimum_bytes`: what this client has reserved of the budget."""

    client: int
    request: int
    minimum_bytes: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """A final answer to a plan or an acquire, or to an operator, who is client 0. `code` is one of
    `tierd_layouts.wire.ErrorCode`."""

    client: int
    request: int
    code: str
    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """An operator's command is in effect for `keys`; of those in `kept` it says why not."""

    request: int
    keys: tuple[LayerKey, ...]
    kept: tuple[tuple[LayerKey, str], ...] = ()


Action = Read | Evict | Discard | Grant | Later | Admit | Refuse | Done
