"""The order in which a model uses its layers: declared as a plan, corrected by the first pass."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd_client.opened import OpenedModel


class _Place(threading.local):
    """Where one thread is. No slots: they would be shared between threads."""

    def __init__(self) -> None:
        self.position = 0  # in the order
        self.trace: list[int] | None = None  # layers entered, while the order is being learned


class Course:
    """Layer numbers in the expected order of use in one pass, and where each thread is in it.

    It is declared to the daemon as a cyclic plan, and replaced by the order that the first whole
    forward pass shows. Raises what `OpenedModel.plan` raises. Thread-safe.
    """

    def __init__(self, opened: OpenedModel, order: Sequence[int], tokens_per_pass: int) -> None:
        self._opened = opened
        self._tokens_per_pass = tokens_per_pass
        self._lock = threading.Lock()
        self._place = _Place()
        self._learned = False
        #: The plan: layer numbers in the order of use.
        self.order: tuple[int, ...] = ()
        self._declare(order)

    def advance(self, layer: int) -> int | None:
        """Note that this thread is at `layer`; returns the layer after it in the order."""
        place, order = self._place, self.order
        if place.trace is not None:
            place.trace.append(layer)
        for step in range(len(order)):
            position = (place.position + step) % len(order)
            if order[position] == layer:
                place.position = (position + 1) % len(order)
                return order[place.position]
        return None  # not in the order: nothing is known of what follows

    def begin_pass(self) -> None:
        """A forward pass of the whole model begins in this thread."""
        self._place.position = 0
        self._place.trace = None if self._learned else []

    def end_pass(self) -> None:
        """The pass ended well: the first one shows the order in which layers are used."""
        trace, self._place.trace = self._place.trace, None
        with self._lock:
            if not trace or self._learned:
                return
            self._learned = True
        if tuple(trace) != self.order:
            self._declare(trace)

    def _declare(self, order: Sequence[int]) -> None:
        self._opened.plan(order, kind="cyclic", lookahead=1, tokens_per_pass=self._tokens_per_pass)
        self.order = tuple(order)
