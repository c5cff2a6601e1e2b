"""What one client will ask for next, and when.

A position is an index into the plan's order; a layer may occur in it several times. The next use of
a layer is expected `step_ns * distance` after the client's last sign of life, counted as a *wait*:

    wait(layer) = (now - last_ns) + step_ns * distance(layer)

so a client that has been silent for an hour is expected to stay silent for another hour, and does
not pin what others need. `now` is the same for all, so comparing waits needs no clock: the *due*
value `step_ns * distance - last_ns` orders them, and changes only with the client's own events.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd.core.model import Hint

DEFAULT_STEP_NS = 10_000_000  #: until the client was seen to step
LONGEST_STEP_NS = 1_000_000_000
SHORTEST_STEP_NS = 1_000
NEVER = 1 << 62  #: the due value of a layer that nobody will ask for


class PlanState:
    """One client's plan and how far it is."""

    __slots__ = (
        "_occurrences",
        "hints",
        "kind",
        "last_ns",
        "lookahead",
        "model",
        "order",
        "position",
        "step_ns",
        "stepped_ns",
        "tokens_per_pass",
    )

    def __init__(
        self,
        model: int,
        order: Sequence[int],
        *,
        kind: str,
        lookahead: int,
        at_ns: int,
        tokens_per_pass: int = 1,
    ) -> None:
        self.model = model
        self.order = tuple(order)
        self.kind = kind
        self.tokens_per_pass = tokens_per_pass
        self.lookahead = lookahead
        self.position = -1  #: index of the layer that was asked for last; -1 before the first
        self.last_ns = at_ns  #: the client's last sign of life
        self.stepped_ns: int | None = None  #: when it last asked for another layer
        self.step_ns = DEFAULT_STEP_NS  #: running mean of the time from one layer to the next
        self.hints: dict[int, Hint] = {}  #: of an open plan, by steps from when each came
        self._occurrences: dict[int, list[int]] = {}
        if kind == "open":
            return  # no order: what it will use next is for hints and reuse to say
        for index, layer in enumerate(self.order):
            self._occurrences.setdefault(layer, []).append(index)

    def uses(self, layer: int) -> bool:
        return layer in self._occurrences

    def layers(self) -> Sequence[int]:
        """Each layer of the plan once, by its first occurrence."""
        return list(self._occurrences)

    def distance(self, layer: int) -> int | None:
        """Steps from here to the next use of `layer`, at least 1; None if it is not used again."""
        indices = self._occurrences.get(layer)
        if indices is None:
            return None
        at = bisect_right(indices, self.position)
        if at < len(indices):
            return indices[at] - self.position
        return indices[0] + len(self.order) - self.position if self.kind == "cyclic" else None

    def due(self, layer: int) -> int:
        """Orders layers by expected next use: larger is later."""
        distance = self.distance(layer)
        return NEVER if distance is None else self.step_ns * distance - self.last_ns

    def ahead(self, steps: int) -> int | None:
        """The layer `steps` after the position; None beyond the end of a plan that is no cycle."""
        if self.kind == "open":
            return None
        index = self.position + steps
        if index >= len(self.order):
            if self.kind != "cyclic":
                return None
            index %= len(self.order)
        return self.order[index]

    def hint(self, hint: Hint) -> None:
        """What the client of an open plan says about its next uses."""
        self.hints[hint.steps] = hint

    def advance(self, layer: int, at_ns: int) -> None:
        """The client asked for `layer`; a layer outside the plan leaves the position as it is."""
        distance = self.distance(layer)
        if distance is None:
            return
        self.position = (self.position + distance) % len(self.order)
        if self.stepped_ns is not None and distance < len(self.order):
            sample = (at_ns - self.stepped_ns) // distance
            longest = min(LONGEST_STEP_NS, 8 * self.step_ns)
            sample = min(max(sample, SHORTEST_STEP_NS), longest)
            self.step_ns = max(self.step_ns + (sample - self.step_ns) // 8, SHORTEST_STEP_NS)
        self.stepped_ns = at_ns
