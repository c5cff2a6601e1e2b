"""The record of every decision: bounded, always on, formatted only when it is read.

An entry is one event, the actions that it led to, and the decisions that were told meanwhile. The
records are immutable, so they are kept as they are: an entry costs a tuple and an append. What the
ring forgets is counted; the arenas, models, clients and plans that a replay of the rest needs are
remembered beyond it (`opening`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from tierd.core.model import (
    ArenaAdded,
    BudgetChanged,
    ClientGone,
    ClientJoined,
    ModelAdded,
    ModelRemoved,
    Pin,
    Plan,
    PlanOver,
    Refuse,
    Unpin,
    WeightChanged,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tierd.core.model import Action, Event, LayerKey

    #: what, layer, reason with `{}` where the values go, the values: one tuple, which is cheap
    Told = tuple[str, LayerKey | None, str, *tuple[object, ...]]

_REMEMBERED = frozenset(
    (
        *(ArenaAdded, BudgetChanged, ModelAdded, ModelRemoved, ClientJoined, ClientGone),
        *(WeightChanged, Plan, PlanOver, Pin, Unpin),
    )
)


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the record."""

    at_ns: int
    what: str  #: read, resident, failed, evict, discard, grant, wait, later, admit, refuse, ...
    key: LayerKey | None
    reason: str  #: why, with `{}` where `values` go
    values: tuple[object, ...] = ()

    @property
    def text(self) -> str:
        """The reason in words."""
        return self.reason.format(*self.values)

    def __str__(self) -> str:
        layer = f" {self.key}" if self.key is not None else ""
        return f"{self.at_ns / 1e9:.6f} {self.what}{layer}: {self.text}"


@dataclass(frozen=True, slots=True)
class Entry:
    """What one event led to. Numbers count from 0 and never start again."""

    number: int
    at_ns: int
    event: Event
    actions: tuple[Action, ...]
    decisions: tuple[Decision, ...]


@dataclass(frozen=True, slots=True)
class Extent:
    """How much the record holds: entries `[first, end)`; those before `first` are forgotten."""

    first: int
    end: int
    first_ns: int | None  #: of the first entry that is kept; None while there is none
    forgotten_decisions: int


class Story:
    """The last entries, as many as fit into `length` events, actions and decisions together."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._kept = 0  #: events, actions and decisions in the ring
        self._ring: deque[tuple[int, Event, tuple[Action, ...], list[Told]]] = deque()
        self._first = 0
        self._forgotten_decisions = 0
        self._budget: BudgetChanged | None = None
        self._arenas: dict[int, ArenaAdded] = {}
        self._models: dict[int, ModelAdded] = {}
        self._clients: dict[int, ClientJoined] = {}
        self._plans: dict[int, Plan] = {}
        self._pins: dict[LayerKey, int] = {}  #: when each was pinned

    def keep(self, at_ns: int, event: Event, actions: list[Action], told: list[Told]) -> None:
        """The event was decided. Forgets the oldest entries where the ring is full.

        `told` is the record's from now on; `actions` stays the caller's.
        """
        self._ring.append((at_ns, event, tuple(actions), told))
        kept = self._kept + 1 + len(actions) + len(told)
        while kept > self._length:
            _, oldest, its_actions, its_told = self._ring.popleft()
            kept -= 1 + len(its_actions) + len(its_told)
            self._first += 1
            self._forgotten_decisions += len(its_told)
            if type(oldest) in _REMEMBERED:  # few are: the case distinction would cost the rest
                self._remember(oldest, its_actions)
        self._kept = kept

    def _remember(self, event: Event, actions: tuple[Action, ...]) -> None:
        """What a replay of the entries after this one needs of it."""
        match event:
            case ArenaAdded():
                self._arenas[event.arena] = event
            case ModelAdded():
                self._models[event.model] = event
            case ModelRemoved():
                self._models.pop(event.model, None)
            case ClientJoined():
                self._clients[event.client] = event
            case WeightChanged():
                joined = self._clients[event.client]
                self._clients[event.client] = replace(joined, weight=event.weight)
            case ClientGone():
                self._clients.pop(event.client, None)
                self._plans.pop(event.client, None)
            case Pin() if not any(isinstance(action, Refuse) for action in actions):
                self._pins.update(dict.fromkeys(event.keys, event.at_ns))
            case Unpin():
                for key in event.keys:
                    self._pins.pop(key, None)
            case Plan() if not any(isinstance(action, Refuse) for action in actions):
                self._plans[event.client] = event
            case BudgetChanged() if not any(isinstance(action, Refuse) for action in actions):
                self._budget = event
            case PlanOver() if event.client in self._plans:
                if self._plans[event.client].model == event.model:
                    del self._plans[event.client]
            case _:
                pass

    @property
    def extent(self) -> Extent:
        return Extent(
            self._first,
            self._first + len(self._ring),
            self._ring[0][0] if self._ring else None,
            self._forgotten_decisions,
        )

    def opening(self) -> list[Event]:
        """What was there when the first entry that is kept began: the budget if it was changed,
        arenas, models, pins, clients, plans, with the times at which they came."""
        pins = [
            Pin(at_ns, 0, (key,)) for key, at_ns in self._pins.items() if key.model in self._models
        ]
        plans = [plan for plan in self._plans.values() if plan.model in self._models]
        changed = [] if self._budget is None else [self._budget]
        return [
            *changed, *self._arenas.values(), *self._models.values(), *pins,
            *self._clients.values(), *plans,
        ]  # fmt: skip

    def entries(self, first: int = 0, limit: int | None = None) -> Iterator[Entry]:
        """The entries from number `first` on that are still kept, oldest first."""
        skip = max(first - self._first, 0)
        stop = None if limit is None else skip + limit
        for offset, (at_ns, event, actions, told) in enumerate(
            islice(self._ring, skip, stop), start=self._first + skip
        ):
            decisions = tuple(_decision(at_ns, one) for one in told)
            yield Entry(offset, at_ns, event, actions, decisions)

    def about(self, key: LayerKey | None = None) -> list[Decision]:
        """The decisions about one layer, or all of them; oldest first."""
        return [
            _decision(at_ns, one)
            for at_ns, _, _, told in self._ring
            for one in told
            if key is None or one[1] == key
        ]


def _decision(at_ns: int, told: Told) -> Decision:
    return Decision(at_ns, told[0], told[1], told[2], told[3:])
