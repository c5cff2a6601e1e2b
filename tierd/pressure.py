"""Whether others want the memory of a tier that its clients keep, and how long they did in vain."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tierd_layouts.slot_table import SlotTable


class Pressure:
    """The word of the slot table by which clients keep leases or give them back."""

    def __init__(self, table: SlotTable, now_ns: int) -> None:
        self._table = table
        self.on = table.pressed = True  # until the core was heard
        self._since_ns = self._until_ns = now_ns

    def tell(self, on: bool, now_ns: int) -> None:
        """Write it down for the clients."""
        if on is self.on:
            return
        self.on = self._table.pressed = on
        if on:
            self._since_ns = now_ns
        else:
            self._until_ns = now_ns

    def unheeded_ns(self, since_ns: int, now_ns: int) -> int:
        """How long it lasted, this time or the last, after `since_ns`."""
        end_ns = now_ns if self.on else self._until_ns
        return max(end_ns - max(since_ns, self._since_ns), 0)
