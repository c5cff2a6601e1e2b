"""An opened model without a daemon: leases that are granted at once, as far as there is room."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from tierd_client.errors import DaemonGone, LayerNotFound, LeaseLimit, LeaseLost

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tierd_client.leasing import LayerLeases


class FakeLease:
    def __init__(self, opened: FakeOpened, layer: int) -> None:
        self.opened = opened
        self.layer = layer

    generation = 1

    @property
    def where(self) -> str:
        return f"fake/{self.layer}"

    def leave(self, *, fenced: bool = True) -> bool:
        self.opened.fences += [self.layer] * fenced
        return self.sound

    @property
    def sound(self) -> bool:
        return self.layer not in self.opened.spoilt

    def release(self) -> None:
        with self.opened.lock:
            self.opened.held.remove(self.layer)
        self.opened.log.append(("release", self.layer))
        if self.opened.raises_lost and not self.sound:
            raise LeaseLost("the slot changed")


class FakePending:
    """Granted at once where there is room, as the daemon does; else "later"."""

    def __init__(self, opened: FakeOpened, layer: int) -> None:
        self.opened = opened
        self.layer = layer
        with opened.lock:
            self.granted = len(opened.held) < opened.room
            if self.granted:
                opened.held.append(layer)

    def resolve(self) -> Any:
        if self.opened.on_resolve is not None:
            self.opened.on_resolve()
        self.opened.waiting.remove(self)
        if not self.granted:
            return self.opened.acquire(self.layer, "later")
        self.opened.log.append(("resolve", self.layer))
        return FakeLease(self.opened, self.layer)

    def cancel(self) -> None:
        self.opened.waiting.remove(self)
        self.opened.log.append(("cancel", self.layer))
        if self.granted:
            with self.opened.lock:
                self.opened.held.remove(self.layer)


class FakeOpened:
    """A model of which at most `room` layers may be leased at once, like a client's reserve."""

    name = "fake"

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.lock = threading.Lock()
        self.held: list[int] = []
        self.waiting: list[FakePending] = []
        self.plans: list[tuple[int, ...]] = []
        self.log: list[tuple[str, int]] = []
        self.broken: set[int] = set()
        self.raises_lost = False  # when a lease that is spoilt is released
        self.fences: list[int] = []  # layers whose use ended
        self.spoilt: set[int] = set()  # layers whose lease cannot be kept
        self.ended: DaemonGone | None = None
        self.pressed = True  # memory is short: nothing is kept
        self.on_resolve: Callable[[], None] | None = None

    def layer_name(self, layer: int) -> str:
        return ["zero", "one", "two", "three"][layer]

    def check_connection(self) -> None:
        if self.ended is not None:
            raise self.ended

    look = check_connection

    def plan(self, order: Sequence[int], *, kind: str, lookahead: int, tokens_per_pass: int) -> int:
        assert kind == "cyclic"
        assert lookahead == 1
        assert tokens_per_pass == 1
        self.plans.append(tuple(order))
        return 0

    def acquire(self, layer: int, how: str = "acquire") -> Any:
        self.log.append((how, layer))
        if layer in self.broken:
            raise LayerNotFound(f"layer {layer}", "not_found")
        with self.lock:
            if len(self.held) >= self.room:
                raise LeaseLimit(f"client holds {len(self.held)}", "lease_limit")
            self.held.append(layer)
        return FakeLease(self, layer)

    def acquire_ahead(self, layer: int) -> Any:
        self.log.append(("ahead", layer))
        pending = FakePending(self, layer)
        self.waiting.append(pending)
        return pending


def run_pass(leases: LayerLeases, order: Sequence[int]) -> None:
    leases.begin_pass()
    for layer in order:
        leases.enter(layer)
        leases.leave(layer)
    leases.end_pass()
