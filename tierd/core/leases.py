"""Who may hold how much: reserves, charges, and the rule that admits.

Every client `c` has a *reserve* `Q_c`, the charge of the largest layer of its plan, and *holds*
`h_c`, the charges of the layers that it leases or was promised. A layer counts once per client, and
once for every client that holds it: were a shared slot counted once in all, the release by one
client would raise what the other is charged with. The rule, in granules:

    sum over clients of max(Q_c, h_c)  +  quarantined  <=  budget

It holds after every accepted request, so all accepted requests fit beside all leases at once, and
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


class Ledger:
    """The accounts of all clients under one budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.quarantined = 0
        self.awaited = 0  #: reserves of plans that wait until others hold less
        self.committed = 0  #: sum of `Account.committed`
        self._accounts: dict[int, Account] = {}

    def __getitem__(self, client: int) -> Account:
        return self._accounts[client]

    @property
    def available(self) -> int:
        """Granules that nobody has reserved or holds."""
        return self.budget - self.quarantined - self.committed

    def open(self, client: int) -> None:
        self._accounts[client] = Account()

    def close(self, client: int) -> None:
        self.committed -= self._accounts.pop(client).committed

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
        return more <= 0 or more <= self.available - kept_back

    def admits_once_released(self, client: int, reserve: int) -> bool:
        """Whether the rule would hold with this reserve if nobody held more than its own."""
        others = sum(a.reserve for number, a in self._accounts.items() if number != client)
        mine = max(reserve, self._accounts[client].held)
        return others + mine + self.quarantined <= self.budget

    def set_reserve(self, client: int, reserve: int) -> None:
        account = self._accounts[client]
        self.committed -= account.committed
        account.reserve = reserve
        self.committed += account.committed

    def hold(self, client: int, key: LayerKey, charge: int) -> None:
        account = self._accounts[client]
        account.layers[key] += 1
        if account.layers[key] == 1:
            self.committed -= account.committed
            account.charges[key] = charge
            account.held += charge
            self.committed += account.committed

    def let_go(self, client: int, key: LayerKey) -> None:
        account = self._accounts[client]
        account.layers[key] -= 1
        if not account.layers[key]:
            del account.layers[key]
            self.committed -= account.committed
            account.held -= account.charges.pop(key)
            self.committed += account.committed

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
        if committed + self.quarantined > self.budget and not over_budget:
            raise InvariantBroken(
                f"{committed} granules committed and {self.quarantined} quarantined "
                f"exceed the budget of {self.budget}"
            )
