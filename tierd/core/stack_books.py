"""Everything that a stack knows beside its machines, in one place; it decides nothing.

`todo` is what one machine owes another: it is worked off before an event is over, so between two
events no machine owes another anything.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from tierd.core.machine import TierMachine
from tierd.core.model import Refuse, Tick
from tierd.core.residency import SlotState

if TYPE_CHECKING:
    from tierd.core.model import Event, LayerKey, Plan
    from tierd.core.residency import Slot
    from tierd.core.stack_feed import Feed
    from tierd.core.stack_model import StackAction, StackConfig


class StackBooks:
    """The machines, the feeds, and what is under way between them."""

    def __init__(self, config: StackConfig) -> None:
        if config.direct and len(config.direct) != len(config.gpus):
            raise ValueError(f"`direct` names {len(config.direct)} of {len(config.gpus)} GPUs")
        self.config = config
        self.dram = TierMachine(config.dram)
        self.gpus = tuple(TierMachine(gpu) for gpu in config.gpus)
        self.feeds: dict[tuple[int, int], Feed] = {}  #: by GPU and model
        self.feed_of: dict[int, Feed] = {}  #: by pseudo-client
        self.now = 0
        self.todo: deque[tuple[int | None, Event]] = deque()  #: GPU, or None for DRAM; event
        self.actions: list[StackAction] = []
        self.unsettled: dict[int, Feed] = {}  #: that perhaps nobody needs any more
        self._requests = 0

    def request(self) -> int:
        """The number of the next request of a pseudo-client."""
        self._requests += 1
        return self._requests

    def settle(self, feed: Feed) -> None:
        """Looks at the end of the event whether the feed is still needed."""
        if not feed.users:
            self.unsettled[feed.id] = feed

    def settle_all(self, gpu: int) -> None:
        """A request on the GPU ended without its layer: perhaps a feed was open only for it."""
        for feed in self.feeds.values():
            if feed.gpu == gpu:
                self.settle(feed)

    def in_dram(self, key: LayerKey) -> Slot | None:
        """The layer's slot in DRAM, which may still have to be filled."""
        model = self.dram.books.models.get(key.model)
        return None if model is None else model.slots[key.layer]

    def read_in_dram(self, key: LayerKey) -> Slot | None:
        """The slot in DRAM that the layer is being read into at present."""
        slot = self.in_dram(key)
        return slot if slot is not None and slot.state is SlotState.READING else None

    def tell(self, gpu: int, what: str, key: LayerKey, reason: str, *values: object) -> None:
        """Records what was decided between the machines, in the record of the GPU: nothing happened
        in that machine, so it stands with a moment of time."""
        tick = Tick(self.now)
        self.gpus[gpu].record.keep(self.now, tick, [], [(what, key, reason, *values)])

    def refuse(self, plan: Plan, code: str, text: str) -> None:
        self.actions.append(Refuse(plan.client, plan.request, code, text))
