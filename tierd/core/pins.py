"""What an operator decides: layers that stay, whatever plans say, and layers that go now.

A pinned layer is read when nobody who stalls needs the device more, in the operator's own share of
it, and is never evicted. Pins count in the rule that admits (`leases`): a pin that would leave less
than the reserves and leases of clients is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd.core.model import OPERATOR, Done, EvictNow, Pin, Refuse, Unpin
from tierd.core.residency import SlotState

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd.core.books import Books
    from tierd.core.emptying import Emptier
    from tierd.core.model import LayerKey
    from tierd.core.served import ModelState


class Pins:
    """Pins, unpins and evicts by command."""

    def __init__(self, books: Books, emptier: Emptier) -> None:
        self._books = books
        self._emptier = emptier

    def pin(self, event: Pin) -> None:
        """All of the layers, or none."""
        if not self._known(event):
            return
        new = [key for key in dict.fromkeys(event.keys) if key not in self._books.pins]
        charges = [self._charge(key) for key in new]
        ledger = self._books.ledger
        granule = self._books.config.granule_bytes
        room = ledger.available - ledger.awaited
        wanted = self._anew(new)
        if not ledger.admits_pins(sum(charges), 0, wanted):
            self._refuse(
                event, "budget_too_small",
                f"{len(new)} layers to pin need {sum(charges) * granule} bytes; "
                f"{max(room, 0) * granule} of the budget of {ledger.budget * granule} are "
                f"available ({ledger.pinned * granule} are pinned, "
                f"{(ledger.committed + ledger.awaited) * granule} reserved or held by "
                f"{len(self._books.clients)} clients, "
                f"{ledger.quarantined * granule} in quarantine)",
            )  # fmt: skip
            return
        if new and not ledger.admits_pins(0, len(new), wanted):
            self._refuse(
                event, "lease_limit",
                f"{len(new)} layers to pin need as many slots; {max(ledger.available_slots, 0)} of "
                f"{ledger.slot_limit} are available",
            )  # fmt: skip
            return
        for key, charge in zip(new, charges, strict=True):
            self._books.pins[key] = charge
            ledger.pinned += charge
            ledger.pinned_slots += 1
            model = self._books.models[key.model]
            self._books.wanted.add(model, (key.layer,))
            if key.layer in model.failed:
                self._books.policy.worth_a_read_again(model, key.layer)
            slot = model.slots[key.layer]
            if slot is None:
                self._books.devices[model.device].unread_pins[key] = None
            else:
                slot.pinned = True
                model.busy(slot)
            self._books.tell("pin", key, "an operator pinned it, {} bytes", charge * granule)
        self._done(event, event.keys)

    def unpin(self, event: Unpin) -> None:
        """Those of the layers that are pinned; a layer of no served model is not."""
        pinned = [key for key in dict.fromkeys(event.keys) if key in self._books.pins]
        for key in pinned:
            self._unpin(key)
            self._books.tell("unpin", key, "an operator unpinned it")
        self._done(event, pinned)

    def forget(self, model: ModelState) -> None:
        """The model is served no more."""
        for key in model.keys:
            if key in self._books.pins:
                self._unpin(key)

    def _unpin(self, key: LayerKey) -> None:
        self._books.ledger.pinned -= self._books.pins.pop(key)
        self._books.ledger.pinned_slots -= 1
        model = self._books.models[key.model]
        self._books.wanted.drop(model, (key.layer,))
        self._books.devices[model.device].unread_pins.pop(key, None)
        slot = model.slots[key.layer]
        if slot is not None:
            slot.pinned = False
            if slot.state is SlotState.RESIDENT:
                self._books.policy.resident(slot)

    def evict(self, event: EvictNow) -> None:
        """Those of the layers that are resident and that nobody holds; says why the others stay."""
        if not self._known(event):
            return
        evicted: list[LayerKey] = []
        kept: list[tuple[LayerKey, str]] = []
        for key in dict.fromkeys(event.keys):
            slot = self._books.models[key.model].slots[key.layer]
            if slot is None:
                continue
            if slot.evictable:
                self._emptier.evict(slot, "an operator said so")
                evicted.append(key)
            elif slot.leases or slot.holders:
                number = slot.leases + len(slot.holders)
                kept.append(
                    (key, f"{number} leases are on it" if number > 1 else "a lease is on it")
                )
            else:
                kept.append((key, "it is pinned" if slot.pinned else "it is being read"))
        self._done(event, evicted, kept)

    def _anew(self, keys: Iterable[LayerKey]) -> tuple[int, int]:
        """The granules and the number of those of the layers that nobody wants yet."""
        models, wanted = self._books.models, self._books.wanted
        found = [wanted.anew(models[key.model], (key.layer,)) for key in keys]
        return sum(granules for granules, _ in found), sum(number for _, number in found)

    def _charge(self, key: LayerKey) -> int:
        return self._books.models[key.model].charges[key.layer]

    def _known(self, event: Pin | EvictNow) -> bool:
        """Whether all layers are of served models; refuses the event where not."""
        for key in event.keys:
            model = self._books.served(key.model)
            if isinstance(model, str):
                self._refuse(event, model, f"model {key.model} is not served")
                return False
            if not 0 <= key.layer < len(model.slots):
                self._refuse(
                    event, "not_found",
                    f"model '{model.name}' has layers 0 to {len(model.slots) - 1}, not {key.layer}",
                )  # fmt: skip
                return False
        return True

    def _refuse(self, event: Pin | EvictNow, code: str, text: str) -> None:
        self._books.count["refusals"] += 1
        self._books.actions.append(Refuse(OPERATOR, event.request, code, text))
        self._books.tell("refuse", None, "an operator: {}: {}", code, text)

    def _done(
        self,
        event: Pin | Unpin | EvictNow,
        keys: Iterable[LayerKey],
        kept: Iterable[tuple[LayerKey, str]] = (),
    ) -> None:
        self._books.actions.append(Done(event.request, tuple(keys), tuple(kept)))
