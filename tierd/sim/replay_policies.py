"""What a recorded day is compared with: caches that know only the past.

`DemandMachine` takes the same events as `TierMachine` and returns the same actions, so that one
replay runs both. It is what loaders commonly are: a cache of whole layers, filled on demand, with
the clients' read-ahead where there is room, one of these choosing the victims:

lru, mru      least, most recently used
lfu           least often used; of those the least recently used
pin-first-n   what came first stays for good, all else passes through; n is as large as leaves room
              for two of the largest layers
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tierd.core.model import (
    Acquire,
    Admit,
    ClientGone,
    Evict,
    Grant,
    Later,
    LayerKey,
    ModelAdded,
    Plan,
    Read,
    ReadDone,
    Refuse,
    Release,
)
from tierd.sim.reference import Outcome, next_uses

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from tierd.core.model import Action, CoreConfig, Event

K = TypeVar("K", bound="Hashable")

DEMAND_POLICIES = ("lru", "lfu", "mru", "pin-first-n")


@dataclass(slots=True)
class Use:
    """What the policies know about a layer."""

    last: int = 0  #: number of the last use
    count: int = 0
    pinned: bool = False


def rank(policy: str, use: Use) -> tuple[int, int]:
    """The victim is the smallest. Raises ValueError for an unknown policy."""
    match policy:
        case "lru" | "pin-first-n":
            return (int(use.pinned), use.last)
        case "mru":
            return (0, -use.last)
        case "lfu":
            return (use.count, use.last)
        case _:
            raise ValueError(f"policy {policy!r} is not one of {', '.join(DEMAND_POLICIES)}")


def whole_layers(
    policy: str, references: Sequence[K], nbytes: Mapping[K, int], capacity_bytes: int
) -> Outcome:
    """The same policies without time: one layer in use at once, no reading ahead.

    Also "furthest": the layer with the furthest next use goes, the one just used included. Whole
    layers make it an upper bound of the minimum, where `min_with_bypass` is a lower one.
    """
    following = next_uses(references)
    uses: dict[K, Use] = {}
    due: dict[K, int] = {}
    kept: dict[K, int] = {}
    room = 2 * max(nbytes.values(), default=0)
    total = sum(nbytes[key] for key in set(references))
    pinned = hits = asked = read = 0
    for index, key in enumerate(references):
        size = nbytes[key]
        asked += size
        use = uses.setdefault(key, Use())
        use.last, use.count = index + 1, use.count + 1
        due[key] = following[index]
        if key in kept:
            hits += 1
        else:
            read += size
            if policy == "pin-first-n" and (
                total <= capacity_bytes or pinned + size <= capacity_bytes - room
            ):
                use.pinned = True
                pinned += size
            kept[key] = size
        while sum(kept.values()) > capacity_bytes:
            others = [other for other in kept if other != key] or [key]
            if policy == "furthest":
                victim = max(kept, key=lambda other: due[other])
            else:
                victim = min(others, key=lambda other: rank(policy, uses[other]))
            del kept[victim]
    return Outcome(policy, len(references), hits, asked, read)


@dataclass(slots=True, eq=False)
class Held:
    """A layer in memory, or on its way."""

    key: LayerKey
    slot: int
    nbytes: int
    filled: bool = False
    ahead: bool = False  #: read ahead and not used yet: the last to go
    leases: int = 0


class DemandMachine:
    """Grants what is resident, reads what is asked for, evicts as its policy says.

    A request ahead starts a read where nobody waits and there is room, and is answered `Later`:
    nobody holds a lease that it does not compute with, so every demand ends.
    """

    def __init__(self, config: CoreConfig, policy: str) -> None:
        rank(policy, Use())
        self._policy = policy
        self._budget = config.budget_bytes
        self._limit = config.reads_in_flight
        self._sizes: dict[int, tuple[int, ...]] = {}
        self._held: dict[LayerKey, Held] = {}
        self._slots: dict[int, Held] = {}
        self._uses: dict[LayerKey, Use] = {}
        self._leases: dict[int, tuple[int, Held]] = {}  #: by lease: the client, the layer
        self._demands: list[Acquire] = []  #: in order of arrival
        self._used_bytes = self._pinned_bytes = 0
        self._reading = self._ticks = self._last = 0
        self._actions: list[Action] = []

    @property
    def waits_for_time(self) -> bool:
        return False

    @property
    def wakes_at_ns(self) -> int | None:
        return None

    def handle(self, event: Event) -> list[Action]:
        """Takes one event, returns what is to be done."""
        self._actions = []
        match event:
            case ModelAdded():
                self._sizes[event.model] = event.layer_bytes
            case Plan():
                self._plan(event)
            case Acquire():
                self._acquire(event)
            case Release():
                self._release(event.lease)
            case ReadDone():
                self._reading -= 1
                self._slots[event.slot].filled = True
            case ClientGone():
                self._demands = [d for d in self._demands if d.client != event.client]
                for lease in [n for n, (c, _) in self._leases.items() if c == event.client]:
                    self._release(lease)
            case _:
                pass
        self._serve(event.at_ns)
        return self._actions

    def _nbytes(self, key: LayerKey) -> int:
        return self._sizes[key.model][key.layer]

    def _plan(self, plan: Plan) -> None:
        largest = max(self._sizes[plan.model][layer] for layer in plan.order)
        if largest > self._budget:
            self._too_small(plan, largest)
        else:
            self._actions.append(Admit(plan.client, plan.request, 0))

    def _too_small(self, event: Plan | Acquire, nbytes: int) -> None:
        text = f"a layer of {nbytes} bytes does not fit into a budget of {self._budget}"
        self._actions.append(Refuse(event.client, event.request, "budget_too_small", text))

    def _acquire(self, event: Acquire) -> None:
        if self._nbytes(event.key) > self._budget:
            self._too_small(event, self._nbytes(event.key))
        elif not event.ahead:
            self._demands.append(event)
        else:
            self._actions.append(Later(event.client, event.request))
            if event.key not in self._held and not self._demands and self._reading < self._limit:
                self._fetch(event.key, ahead=True)

    def _release(self, lease: int) -> None:
        _, held = self._leases.pop(lease)
        held.leases -= 1

    def _serve(self, now_ns: int) -> None:
        """Grants what waits and is there; starts reads in the order of the demands."""
        waiting: list[Acquire] = []
        blocked = False
        for demand in self._demands:
            held = self._held.get(demand.key)
            if held is not None and held.filled:
                self._grant(demand, held, now_ns)
                continue
            waiting.append(demand)
            if held is None and not blocked:
                blocked = self._reading >= self._limit or not self._fetch(demand.key, ahead=False)
        self._demands = waiting

    def _grant(self, demand: Acquire, held: Held, now_ns: int) -> None:
        self._ticks += 1
        use = self._uses.setdefault(held.key, Use())
        use.last, use.count = self._ticks, use.count + 1
        held.ahead = False
        held.leases += 1
        self._last += 1
        self._leases[self._last] = (demand.client, held)
        waited_ns = now_ns - demand.at_ns
        self._actions.append(
            Grant(
                demand.client, demand.request, self._last, held.key, held.slot, held.slot, 0, 0,
                held.nbytes, waited_ns,
            )
        )  # fmt: skip

    def _fetch(self, key: LayerKey, *, ahead: bool) -> bool:
        """Starts the read of a layer where room can be made for it."""
        nbytes = self._nbytes(key)
        victims = self._victims(nbytes - (self._budget - self._used_bytes), ahead=ahead)
        if victims is None:
            return False
        for victim in victims:
            del self._held[victim.key], self._slots[victim.slot]
            self._used_bytes -= victim.nbytes
            self._pin(victim.key, pinned=False)
            self._actions.append(Evict(victim.slot, victim.slot, victim.key))
        self._last += 1
        held = self._held[key] = self._slots[self._last] = Held(key, self._last, nbytes)
        held.ahead = ahead
        self._used_bytes += nbytes
        self._reading += 1
        if self._policy == "pin-first-n":
            self._pin(key, pinned=self._pinned_bytes + nbytes <= self._pinnable_bytes)
        reason = "ahead" if ahead else "demand"
        self._actions.append(Read(held.slot, held.slot, key, 0, 0, nbytes, reason))
        return True

    def _victims(self, shortfall: int, *, ahead: bool) -> list[Held] | None:
        """Who goes to free so many bytes; None if leases and reads hold too much of the memory.
        For a layer read ahead nothing that is pinned or was itself read ahead goes."""
        victims: list[Held] = []
        if shortfall <= 0:
            return victims
        free = [held for held in self._held.values() if held.filled and not held.leases]
        if ahead:
            free = [h for h in free if not h.ahead and not self._use(h).pinned]
        free.sort(key=lambda held: (held.ahead, rank(self._policy, self._use(held))))
        for held in free:
            victims.append(held)
            shortfall -= held.nbytes
            if shortfall <= 0:
                return victims
        return None

    def _use(self, held: Held) -> Use:
        return self._uses.setdefault(held.key, Use())

    @property
    def _pinnable_bytes(self) -> int:
        largest = max((max(sizes) for sizes in self._sizes.values()), default=0)
        everything = sum(sum(sizes) for sizes in self._sizes.values())
        return self._budget if everything <= self._budget else self._budget - 2 * largest

    def _pin(self, key: LayerKey, *, pinned: bool) -> None:
        use = self._uses.setdefault(key, Use())
        self._pinned_bytes += self._nbytes(key) * (pinned - use.pinned)
        use.pinned = pinned
