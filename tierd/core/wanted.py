"""Which layers are wanted: by plans, by an operator's pin, by who still reads a dead client's slot.

A layer is wanted for each of these reasons, and counts once in that sum of the rule (`leases`)
which says whether all that is wanted fits the budget at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd.core.books import Books
    from tierd.core.residency import Slot
    from tierd.core.served import ModelState


class Wanted:
    """Keeps the reasons of each layer, and the ledger's sum of those that have one."""

    def __init__(self, books: Books) -> None:
        self._books = books

    def add(self, model: ModelState, layers: Iterable[int]) -> None:
        """One more reason for each of these layers."""
        reasons, ledger = model.reasons, self._books.ledger
        for layer in layers:
            reasons[layer] += 1
            if reasons[layer] == 1:
                ledger.want(model.charges[layer], model.keys[layer])

    def drop(self, model: ModelState, layers: Iterable[int]) -> None:
        """One reason less for each."""
        reasons, ledger = model.reasons, self._books.ledger
        for layer in layers:
            reasons[layer] -= 1
            if not reasons[layer]:
                held = self._held(model, layer)
                ledger.unwant(model.charges[layer], model.keys[layer], held=held)

    def anew(self, model: ModelState, layers: Iterable[int]) -> tuple[int, int]:
        """The granules and the number of those of the layers that nobody wants yet."""
        new = [model.charges[layer] for layer in layers if not model.reasons[layer]]
        return sum(new), len(new)

    def quarantined(self, slot: Slot) -> None:
        """Somebody may read the slot whose lease has ended."""
        model = self._served(slot)
        if model is not None and slot.key is not None:
            self.add(model, (slot.key.layer,))
        else:
            self._books.ledger.want(slot.place.range.granules)

    def read_no_more(self, slot: Slot) -> None:
        """The slot left quarantine."""
        model = self._served(slot)
        if model is not None and slot.key is not None:
            self.drop(model, (slot.key.layer,))
        else:
            self._books.ledger.unwant(slot.place.range.granules)

    def _served(self, slot: Slot) -> ModelState | None:
        """The model whose layer the slot holds, in as many granules as it is charged."""
        if slot.key is None:
            return None
        model = self._books.models[slot.key.model]
        if slot.place.range.granules != model.charges[slot.key.layer]:
            return None  # an earlier daemon put it there, with granules of another size
        return model

    def _held(self, model: ModelState, layer: int) -> bool:
        slot = model.slots[layer]
        if slot is not None and slot.leases:
            return True
        return bool(self._books.waiting) and model.keys[layer] in self._books.waiting
