"""Everything that the machine knows, in one place; it decides nothing.

The modules that decide (`machine`, and what it lists) write here; `invariants`
and `snapshot` read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.core.errors import IllegalEvent
from tierd.core.leases import Ledger
from tierd.core.memory import Memory
from tierd.core.model import DEFAULT_WEIGHT, Plan
from tierd.core.policy import Policy
from tierd.core.residency import Slot, SlotNumbers
from tierd.core.story import Story
from tierd.core.wanted import Wanted

if TYPE_CHECKING:
    from tierd.core.model import Acquire, Action, CoreConfig, DeviceMeasured, LayerKey
    from tierd.core.plans import PlanState
    from tierd.core.served import ModelState
    from tierd.core.shares import Bill, Device, Share
    from tierd.core.story import Told


@dataclass(slots=True, eq=False)
class Request:
    """An accepted acquire that waits for its layer."""

    client: int
    request: int
    key: LayerKey
    since_ns: int | None  #: when the client began to stall for it; None while it has other work
    deadline_ns: int  #: when it is needed: requests are served in this order
    number: int  #: by arrival
    share: Share  #: of the device that the layer is read from
    open: bool = True
    unread: bool = True  #: no read of the layer is on its way


@dataclass(slots=True, eq=False)
class Client:
    """A connected client. `granted`: leases that it was ever given."""

    id: int
    weight: int = DEFAULT_WEIGHT
    plan: PlanState | None = None
    leases: dict[int, Slot] = field(default_factory=dict)
    requests: dict[int, Request] = field(default_factory=dict)  #: by order of arrival
    stalled: int = 0  #: of `requests`: those that it stalls for
    stall_ns: int = 0
    granted: int = 0


class Books:
    """The state of one machine."""

    def __init__(self, config: CoreConfig) -> None:
        self.config = config
        budget = config.budget_bytes // config.granule_bytes
        self.memory = Memory(budget, config.granule_bytes, config.small_layer_bytes)
        self.ledger = Ledger(budget, config.slot_limit)
        self.wanted = Wanted(self)
        self.models: dict[int, ModelState] = {}
        self.removed: set[int] = set()
        self.leaving: dict[int, ModelState] = {}  #: removed, and not all of its slots are empty
        self.clients: dict[int, Client] = {}
        self.policy = Policy(self.memory, self.ledger, self.models)
        self.story = Story(config.story_length)
        self.slots: dict[int, Slot] = {}
        self.numbers = SlotNumbers(config.slot_limit)
        self.holders: dict[int, list[Slot]] = {}
        self.next_generation = config.first_generation
        self.next_lease = config.first_lease
        self.in_flight: dict[int, Slot] = {}  #: claimed or reading, in order of their claim
        self.waiting: dict[LayerKey, list[Request]] = {}
        self.devices: dict[int, Device] = {}  #: what models are read from
        self.bills: dict[int, Bill] = {}  #: by slot: the reads in flight
        self.arrivals = 0
        #: by client: plans, and first requests without one, that wait until others hold less
        self.awaiting: dict[int, Plan | Acquire] = {}
        self.pins: dict[LayerKey, int] = {}  #: layers that stay, and their charges
        self.now = 0
        self.actions: list[Action] = []
        self.told: list[Told] = []  #: decisions of the event that is being handled
        self.count = Counter[str]()
        self.measured: dict[int, DeviceMeasured] = {}  #: by device, the last figures

    def tell(self, what: str, key: LayerKey | None, reason: str, *values: object) -> None:
        """Records a decision (`story`)."""
        self.told.append((what, key, reason, *values))

    def awaited_layer(self, event: Plan | Acquire) -> tuple[ModelState, int]:
        """The layer that decides what is reserved for a plan or request that waits, its model."""
        if isinstance(event, Plan):
            model = self.models[event.model]
            return model, model.largest(event)
        return self.models[event.key.model], event.key.layer

    def reads_limit(self, device: int) -> int:
        """How many reads may run at once on a device."""
        measured = self.measured.get(device)
        return self.config.reads_in_flight if measured is None else measured.reads_in_flight

    def served(self, model: int) -> ModelState | str:
        """The model, or the code of the refusal."""
        if model in self.removed:
            return "model_removed"
        return self.models.get(model, "not_found")

    def client(self, client: int) -> Client:
        """The client; IllegalEvent if it is not connected."""
        found = self.clients.get(client)
        if found is None:
            raise self.illegal(f"client {client} is not connected")
        return found

    def illegal(self, text: str, key: LayerKey | None = None) -> IllegalEvent:
        """The error to raise, with the end of the story about `key`, or of all."""
        return IllegalEvent(text, self.story.about(key)[-20:])
