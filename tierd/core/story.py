"""The record of what was decided and why: bounded, always on, formatted only when read."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tierd.core.model import LayerKey


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the record."""

    at_ns: int
    what: str  #: read, resident, failed, evict, discard, grant, wait, later, admit, refuse, ...
    key: LayerKey | None
    reason: str  #: why, with `{}` where `values` go
    values: tuple[object, ...] = ()

    def __str__(self) -> str:
        layer = f" {self.key.model}/{self.key.layer}" if self.key is not None else ""
        return f"{self.at_ns / 1e9:.6f} {self.what}{layer}: {self.reason.format(*self.values)}"


class Story:
    """The last `length` decisions."""

    def __init__(self, length: int) -> None:
        self._decisions: deque[Decision] = deque(maxlen=length)

    def tell(
        self, at_ns: int, what: str, key: LayerKey | None, reason: str, *values: object
    ) -> None:
        self._decisions.append(Decision(at_ns, what, key, reason, values))

    def about(self, key: LayerKey | None = None) -> list[Decision]:
        """The decisions about one layer, or all of them; oldest first."""
        if key is None:
            return list(self._decisions)
        return [decision for decision in self._decisions if decision.key == key]
