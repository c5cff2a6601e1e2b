"""The budget while the machine runs: another one by command, and whether everything fits it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.model import OPERATOR, Done, Refuse

if TYPE_CHECKING:
    from tierd.core.books import Books
    from tierd.core.model import BudgetChanged


class Budget:
    """Changes it, within what was promised to clients."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def change(self, event: BudgetChanged) -> None:
        """Less than what is reserved, pinned and in quarantine, and one layer more, is refused."""
        books = self._books
        memory, ledger = books.memory, books.ledger
        granule = books.config.granule_bytes
        wanted = event.budget_bytes // granule
        reserved = ledger.reserved
        largest = max(
            (max(model.charges, default=0) for model in books.models.values() if not model.removed),
            default=0,
        )
        least = max(reserved + ledger.pinned + ledger.quarantined + largest, 1)
        if wanted < min(least, memory.budget):
            self._refuse(
                event,
                f"a budget of {event.budget_bytes} bytes is too small: at least {least * granule} "
                f"are needed at present ({reserved * granule} reserved by clients, "
                f"{ledger.pinned * granule} pinned, {ledger.quarantined * granule} in quarantine, "
                f"{largest * granule} for the largest layer)",
            )
            return
        before = memory.budget
        memory.set_budget(wanted)
        ledger.budget = wanted
        books.actions.append(Done(event.request, ()))
        books.tell("budget", None, "an operator changed it from {} to {} bytes", before * granule,
            wanted * granule,
        )  # fmt: skip

    @property
    def pressed(self) -> bool:
        """Somebody waits for room, or what is wanted does not fit at once (`leases`), or somebody
        holds what is served no more."""
        books = self._books
        if books.awaiting or not books.ledger.fits_once:
            return True
        return bool(books.leaving) and any(
            slot is not None and slot.leases
            for model in books.leaving.values()
            for slot in model.slots
        )

    def _refuse(self, event: BudgetChanged, text: str) -> None:
        self._books.count["refusals"] += 1
        self._books.actions.append(Refuse(OPERATOR, event.request, "budget_too_small", text))
        self._books.tell("refuse", None, "an operator: {}: {}", "budget_too_small", text)
