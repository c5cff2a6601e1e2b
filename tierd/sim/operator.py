"""What an operator does to a running fleet: pins, unpins, evicts, gives tiers other budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.model import Done, EvictNow, LayerKey, Pin, Refuse, Unpin
from tierd.core.stack_model import TierBudgetChanged
from tierd.sim.errors import BrokenPromise

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

Command = Pin | Unpin | EvictNow | TierBudgetChanged
LAYERS = 8  #: commands name the first layers of a model, some of which it may not have
BUDGET_SHARE = 0.4  #: of the commands
LEAST_PERCENT, MOST_PERCENT = 25, 125  #: of the first budget of a tier


class Operator:
    """Draws commands, and knows what came of them. `budgets`: the first one of each tier."""

    def __init__(self, rng: random.Random, budgets: dict[int | None, int]) -> None:
        self._rng = rng
        self._first = dict(budgets)
        self.budgets = dict(budgets)  #: by tier: in effect
        self.pinned: dict[LayerKey, None] = {}
        self.changed = 0  #: budgets
        self._requests = 0
        self._open: Command | None = None

    def command(self, now_ns: int, served: Sequence[int], last: int) -> Command:
        """The next one; some name models that are gone, or never were (up to `last`)."""
        rng = self._rng
        self._requests += 1
        if rng.random() < BUDGET_SHARE:
            tier = rng.choice(list(self.budgets))
            nbytes = self._first[tier] * rng.randint(LEAST_PERCENT, MOST_PERCENT) // 100
            return self._ask(TierBudgetChanged(now_ns, self._requests, tier, nbytes))
        model = rng.choice(served) if rng.random() < 0.8 else rng.randrange(last)
        keys = tuple(LayerKey(model, rng.randrange(LAYERS)) for _ in range(rng.randint(1, 3)))
        kinds: list[type[Pin | Unpin | EvictNow]] = [Pin, Pin, Unpin, EvictNow]
        return self._ask(rng.choice(kinds)(now_ns, self._requests, keys))

    def unpin_all(self, now_ns: int) -> Command:
        self._requests += 1
        return self._ask(Unpin(now_ns, self._requests, tuple(self.pinned)))

    def answered(self, action: Done | Refuse) -> Command:
        """The command that this answers. Raises BrokenPromise if it answers none."""
        command = self._open
        if command is None or command.request != action.request:
            raise BrokenPromise(f"{action} answers nothing that the operator asked: {command}")
        self._open = None
        if isinstance(action, Refuse):
            if isinstance(command, TierBudgetChanged):
                self._check_refusal(command, action)
            return command
        match command:
            case Pin():
                self.pinned.update(dict.fromkeys(command.keys))
            case Unpin():
                for key in command.keys:
                    self.pinned.pop(key, None)
            case TierBudgetChanged():
                self.budgets[command.gpu] = command.budget_bytes
                self.changed += 1
            case EvictNow():
                pass
        return command

    def check_answered(self) -> None:
        if self._open is not None:
            raise BrokenPromise(f"{self._open} was not answered")

    def _check_refusal(self, command: TierBudgetChanged, action: Refuse) -> None:
        if command.budget_bytes >= self.budgets[command.gpu]:
            raise BrokenPromise(f"{action}, though {command} takes nothing away")

    def _ask(self, command: Command) -> Command:
        self.check_answered()
        self._open = command
        return command
