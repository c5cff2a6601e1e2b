"""Who may hold how much: reserves, charges, and the rule that admits.

Every client `c` has a *reserve* `Q_c`, the charge of the largest layer of its plan, and *holds*
`h_c`, the charges of the layers that it leases or was promised. A layer counts once per client, and
once for every client that holds it: were a shared slot counted once in all, the release by one
client would raise what the other is charged with. The rule, in granules:

    sum over clients of max(Q_c, h_c)  +  quarantined  +  pinned  <=  budget

and the same in slots, of which a reserve is one and every layer that is held or pinned another:

    sum over clients of max(Q_c > 0, layers held)  +  quarantined  +  pinned slots  <=  slot limit

Both hold after every accepted request, so all accepted requests fit beside all leases at once, and
none of them waits for a release (the proof is in README.md).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.core.errors import InvariantBroken

if TYPE_CHECKING:
    from tierd.core.model import LayerKey


@dataclass(slots=True)
class Account:
    """What one client has reserved and holds, in granules."""

    reserve: int = 0
    held: int = 0
    layers: Counter[LayerKey] = field(default_factory=Counter)  #: leases and requests of each layer
    charges: dict[LayerKey, int] = field(default_factory=dict)

    @property
    def committed(self) -> int:
        return max(self.reserve, self.held)

    @property
    def slots(self) -> int:
        return len(self.layers) or int(self.reserve > 0)


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
        self._accounts: dict[int, Account] = {}

    def __getitem__(self, client: int) -> Account:
        return self._accounts[client]

    @property
    def reserved(self) -> int:
        """The reserves of all clients together."""
        return sum(account.reserve for account in self._accounts.values())

    @property
    def total(self) -> int:
        """Granules that somebody has reserved, holds or pinned, or that are in quarantine."""
        return self.committed + self.quarantined + self.pinned

    @property
    def available(self) -> int:
        """Granules that nobody has reserved, holds or pinned; negative after the budget became
        smaller, until so many are released."""
        return self.budget - self.quarantined - self.pinned - self.committed

    @property
    def available_slots(self) -> int:
        """Slots that nobody has reserved, holds or pinned."""
        return self.slot_limit - self.quarantined_slots - self.pinned_slots - self.committed_slots

    def open(self, client: int) -> None:
        self._accounts[client] = Account()

    def close(self, client: int) -> None:
        account = self._accounts.pop(client)
        self.committed -= account.committed
        self.committed_slots -= account.slots

    def extra(self, client: int, key: LayerKey, charge: int) -> int:
        """How much `client` would hold more with this layer."""
        return 0 if key in self._accounts[client].layers else charge

    def admits(self, client: int, *, reserve: int | None = None, extra: int = 0) -> bool:
        """Whether the rule would hold with this reserve and so much more held.

        Holding more than the reserve is allowed only beside the reserves that others wait for.
        """
        account = self._accounts[client]
        wanted = max(account.reserve if reserve is None else reserve, account.held + extra)
        more = wanted - account.committed
        kept_back = self.awaited if reserve is None and wanted > account.reserve else 0
        if 0 < more > self.available - kept_back:
            return False
        new_layers = len(account.layers) + (extra > 0)
        more_slots = (new_layers or int(wanted > 0)) - account.slots
        return more_slots <= 0 or more_slots <= self.available_slots

    def admits_once_released(self, client: int, reserve: int) -> bool:
        """Whether the rule would hold with this reserve if nobody held more than its own."""
        others = [a.reserve for number, a in self._accounts.items() if number != client]
        mine = self._accounts[client]
        slots = sum(other > 0 for other in others) + max(1, len(mine.layers))
        return (
            sum(others) + max(reserve, mine.held) + self.quarantined + self.pinned <= self.budget
            and slots + self.quarantined_slots + self.pinned_slots <= self.slot_limit
        )

    def set_reserve(self, client: int, reserve: int) -> None:
        account = self._accounts[client]
        self.committed -= account.committed
        self.committed_slots -= account.slots
        account.reserve = reserve
        self.committed += account.committed
        self.committed_slots += account.slots

    def hold(self, client: int, key: LayerKey, charge: int) -> None:
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

    def check(self, *, over_budget: bool) -> None:
        for client, account in self._accounts.items():
            if account.held != sum(account.charges.values()):
                raise InvariantBroken(f"client {client} is charged {account.held} granules")
            if (
                set(account.charges) != set(account.layers)
                or min(account.layers.values(), default=1) < 1
            ):
                raise InvariantBroken(f"client {client}: charges and layers differ")
        committed = sum(account.committed for account in self._accounts.values())
        if committed != self.committed:
            raise InvariantBroken(f"{committed} granules committed, booked {self.committed}")
        if committed + self.quarantined + self.pinned > self.budget and not over_budget:
            raise InvariantBroken(
                f"{committed} granules committed, {self.quarantined} quarantined and "
                f"{self.pinned} pinned exceed the budget of {self.budget}"
            )
        slots = sum(account.slots for account in self._accounts.values())
        if slots != self.committed_slots:
            raise InvariantBroken(f"{slots} slots committed, booked {self.committed_slots}")
        if self.available_slots < 0:
            raise InvariantBroken(
                f"{slots} slots committed, {self.quarantined_slots} quarantined and "
                f"{self.pinned_slots} pinned exceed the limit of {self.slot_limit}"
            )
