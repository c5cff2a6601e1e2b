"""Who may hold how much: reserves, charges, and the rule that admits.

Every client `c` has a *reserve* `Q_c`, the charge of the largest layer of its plan, and *holds*
`h_c`, the charges of the layers that it leases or was promised. A layer counts once per client, and
once for every client that holds it: were a shared slot counted once in all, the release by one
client would raise what the other is charged with. The first sum, in granules:

    each:  sum over clients of max(Q_c, h_c)  +  quarantined  +  pinned

Clients that keep one model leased make it large, though the model is in memory once. The second
sum has each *wanted* layer once, whoever holds it: those of plans, pinned ones, those in
quarantine, and what is still held of them when none of this is so any more. All reserves come
beside. `a_c` are the charges of what `c` holds that nobody wanted when it asked:

    once:  wanted layers, each once  +  sum over clients of max(Q_c, a_c)

Whatever is held, and whatever may still be asked for within reserves, is at most each of the two.
The rule: what is more than its client's reserve, and a reserve that grows, is accepted if one of
the two is within the budget then, and one of the same two in slots, where a reserve is one and
every layer another, within the slot limit. So all accepted requests fit beside all leases at once,
and none of them waits for a release (the proof is in README.md). What lies inside a reserve is
always accepted. While a plan waits for room, nobody takes more than its reserve by the second sum.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.core.errors import InvariantBroken

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.core.model import LayerKey


@dataclass(slots=True)
class Account:
    """What one client has reserved and holds, in granules."""

    reserve: int = 0
    held: int = 0
    layers: Counter[LayerKey] = field(default_factory=Counter)  #: leases and requests of each layer
    charges: dict[LayerKey, int] = field(default_factory=dict)
    astray: dict[LayerKey, int] = field(default_factory=dict)  #: charges of what nobody wanted
    astray_held: int = 0  #: their sum

    @property
    def committed(self) -> int:
        return max(self.reserve, self.held)

    @property
    def slots(self) -> int:
        return len(self.layers) or int(self.reserve > 0)

    @property
    def apart(self) -> int:
        """What it has beside the layers that are wanted."""
        return max(self.reserve, self.astray_held)

    @property
    def apart_slots(self) -> int:
        return len(self.astray) or int(self.reserve > 0)


class Ledger:
    """The accounts of all clients under one budget."""

    def __init__(self, budget: int, slot_limit: int) -> None:
        self.budget = budget
        self.slot_limit = slot_limit
        self.quarantined = 0
        self.quarantined_slots = 0
        self.pinned = 0  #: charges of the layers that an operator pinned
        self.pinned_slots = 0
        self.awaited = 0  #: reserves of plans that wait until others hold less
        self.committed = 0  #: sum of `Account.committed`
        self.committed_slots = 0  #: sum of `Account.slots`
        self.wanted = 0  #: charges of the layers that are wanted, each once
        self.wanted_slots = 0
        self.apart = 0  #: sum of `Account.apart`
        self.apart_slots = 0  #: sum of `Account.apart_slots`
        self._lingering: dict[LayerKey, int] = {}  #: wanted only because they are still held
        self._accounts: dict[int, Account] = {}

    def __getitem__(self, client: int) -> Account:
        return self._accounts[client]

    @property
    def reserved(self) -> int:
        """The reserves of all clients together."""
        return sum(account.reserve for account in self._accounts.values())

    @property
    def promised(self) -> int:
        """The rule's sum: accepted requests and reserves never need more granules at once."""
        each = self.committed + self.quarantined + self.pinned
        return min(each, self.wanted + self.apart)

    @property
    def fits_once(self) -> bool:
        """Whether all that is wanted and every reserve fit at once."""
        return self._once(0) and self._once_in_slots(0)

    @property
    def available(self) -> int:
        """Granules that nobody has reserved, holds or pinned, by the sum that counts a layer for
        each of its holders; negative where only the other one is within the budget."""
        return self.budget - self.quarantined - self.pinned - self.committed

    @property
    def available_slots(self) -> int:
        """Slots that nobody has reserved, holds or pinned."""
        return self.slot_limit - self.quarantined_slots - self.pinned_slots - self.committed_slots

    def open(self, client: int) -> None:
        self._accounts[client] = Account()

    def close(self, client: int) -> None:
        account = self._accounts.pop(client)
        self._subtract(account)
        if self._lingering:
            for key in account.layers:
                self._let_linger(key)

    def want(self, charge: int, key: LayerKey | None = None) -> None:
        """A layer is wanted now; None: it is none, but its slot is in quarantine."""
        if key is not None and key in self._lingering:
            del self._lingering[key]
            return
        self.wanted += charge
        self.wanted_slots += 1

    def unwant(self, charge: int, key: LayerKey | None = None, *, held: bool = False) -> None:
        """It is wanted no more; if it is `held` it counts until it is not."""
        if held and key is not None:
            self._lingering[key] = charge
            return
        self.wanted -= charge
        self.wanted_slots -= 1

    def extra(self, client: int, key: LayerKey, charge: int) -> int:
        """How much `client` would hold more with this layer."""
        return 0 if key in self._accounts[client].layers else charge

    def admits(
        self, client: int, *, extra: int = 0, wanted: bool = False, reserve: int | None = None
    ) -> bool:
        """Whether the rule would hold with so much more held, of a layer that is `wanted` or not.

        `reserve`: None is its own. Holding more than its own is allowed only beside the reserves
        that others wait for.
        """
        account = self._accounts[client]
        least = account.reserve if reserve is None else reserve
        held = max(least, account.held + extra)
        more = held - account.committed
        awaited = self.awaited if held > account.reserve else 0
        if 0 < more > self.available - awaited:
            astray = account.astray_held + (0 if wanted else extra)
            if awaited or not self._once(max(least, astray) - account.apart):
                return False
        slots = (len(account.layers) + (extra > 0) or int(held > 0)) - account.slots
        if slots <= 0 or slots <= self.available_slots:
            return True
        strays = len(account.astray) + (extra > 0 and not wanted)
        return self._once_in_slots((strays or int(held > 0)) - account.apart_slots)

    def admits_plan(
        self, client: int, reserve: int, wanted: Callable[[], tuple[int, int]] = lambda: (0, 0)
    ) -> bool:
        """Whether the rule would hold with this reserve, or it is not larger than the present one.

        `wanted`: the granules and the number of the plan's layers that nobody wants yet.
        """
        account = self._accounts[client]
        if reserve <= account.reserve:
            return True
        if max(reserve, account.held) - account.committed > self.available:
            apart = max(reserve, account.astray_held) - account.apart
            if not self._once(wanted()[0] + apart):
                return False
        if (len(account.layers) or 1) - account.slots <= self.available_slots:
            return True
        strays = len(account.astray) or 1
        return self._once_in_slots(wanted()[1] + strays - account.apart_slots)

    def admits_pins(self, charge: int, layers: int, wanted: tuple[int, int]) -> bool:
        """Whether the rule would hold with these pinned, of which so many granules and layers are
        `wanted` anew."""
        if charge > self.available - self.awaited and (self.awaited or not self._once(wanted[0])):
            return False
        return layers <= self.available_slots or self._once_in_slots(wanted[1])

    def _once(self, more: int) -> bool:
        return self.wanted + self.apart + more <= self.budget

    def _once_in_slots(self, more: int) -> bool:
        return self.wanted_slots + self.apart_slots + more <= self.slot_limit

    def admits_once_released(self, client: int, reserve: int) -> bool:
        """Whether the rule would hold with this reserve if nobody held more than its own, and
        nobody read a dead client's slots any more: both may end while one waits."""
        others = [a.reserve for number, a in self._accounts.items() if number != client]
        mine = self._accounts[client]
        slots = sum(other > 0 for other in others) + max(1, len(mine.layers))
        return (
            sum(others) + max(reserve, mine.held) + self.pinned <= self.budget
            and slots + self.pinned_slots <= self.slot_limit
        )

    def set_reserve(self, client: int, reserve: int) -> None:
        account = self._accounts[client]
        self._subtract(account)
        account.reserve = reserve
        self._add(account)

    def hold(self, client: int, key: LayerKey, charge: int, *, wanted: bool = False) -> None:
        """The client is charged for a layer that is `wanted` or not, whether it has it or asks."""
        account = self._accounts[client]
        layers = account.layers
        if key in layers:
            layers[key] += 1
            return
        # A reserve is committed already: of what is held only the rest comes on top.
        above = account.held + charge - account.reserve
        if above > 0:
            self.committed += min(above, charge)
        self.committed_slots += bool(layers or not account.reserve)
        layers[key] = 1
        account.charges[key] = charge
        account.held += charge
        if not wanted:
            self._stray(account, key, charge)

    def let_go(self, client: int, key: LayerKey) -> None:
        account = self._accounts[client]
        layers = account.layers
        if layers[key] > 1:
            layers[key] -= 1
            return
        layers.pop(key)
        charge = account.charges.pop(key)
        above = account.held - account.reserve
        if above > 0:
            self.committed -= min(above, charge)
        self.committed_slots -= bool(layers or not account.reserve)
        account.held -= charge
        if account.astray and key in account.astray:
            self._stray(account, key, -charge)
        if self._lingering:
            self._let_linger(key)

    def _stray(self, account: Account, key: LayerKey, charge: int) -> None:
        """The client holds the layer, which nobody wanted, or (a negative charge) does no more."""
        self.apart -= account.apart
        self.apart_slots -= account.apart_slots
        if charge > 0:
            account.astray[key] = charge
        else:
            del account.astray[key]
        account.astray_held += charge
        self.apart += account.apart
        self.apart_slots += account.apart_slots

    def _let_linger(self, key: LayerKey) -> None:
        """Somebody holds the layer no more: perhaps nobody does."""
        if key in self._lingering and not any(key in a.layers for a in self._accounts.values()):
            self.unwant(self._lingering.pop(key))

    def _subtract(self, account: Account) -> None:
        self.committed -= account.committed
        self.committed_slots -= account.slots
        self.apart -= account.apart
        self.apart_slots -= account.apart_slots

    def _add(self, account: Account) -> None:
        self.committed += account.committed
        self.committed_slots += account.slots
        self.apart += account.apart
        self.apart_slots += account.apart_slots

    @property
    def lingering(self) -> dict[LayerKey, int]:
        """Charges of the layers that are wanted only because they are held, for `invariants`."""
        return self._lingering

    def needed(self, others: dict[LayerKey, int]) -> tuple[int, int]:
        """Granules and slots of all that is held or asked for, each layer once, of `others` (by
        their charges) and of what is left of all reserves: this must always be there."""
        layers = dict(others)
        rest = slots = 0
        for account in self._accounts.values():
            layers.update(account.charges)
            rest += account.committed - account.held
            slots += account.slots - len(account.layers)
        return sum(layers.values()) + rest, len(layers) + slots

    def check(self) -> None:
        for client, account in self._accounts.items():
            if account.held != sum(account.charges.values()):
                raise InvariantBroken(f"client {client} is charged {account.held} granules")
            if (
                set(account.charges) != set(account.layers)
                or min(account.layers.values(), default=1) < 1
            ):
                raise InvariantBroken(f"client {client}: charges and layers differ")
            if account.astray_held != sum(account.astray.values()) or not (
                account.astray.keys() <= account.charges.keys()
            ):
                raise InvariantBroken(f"client {client}: what it holds astray is not what it holds")
        accounts = self._accounts.values()
        sums = (
            (self.committed, sum(account.committed for account in accounts)),
            (self.committed_slots, sum(account.slots for account in accounts)),
            (self.apart, sum(account.apart for account in accounts)),
            (self.apart_slots, sum(account.apart_slots for account in accounts)),
        )
        if any(booked != found for booked, found in sums):
            raise InvariantBroken(f"granules and slots booked and found differ: {sums}")
        for key in self._lingering:
            if not any(key in account.layers for account in accounts):
                raise InvariantBroken(f"{key} counts as held, but nobody holds it")
