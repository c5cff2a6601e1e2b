"""Virtual clients: they compute with one layer after the other, or misbehave in a chosen way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tierd.core.model import (
    Acquire,
    Admit,
    ClientGone,
    ClientJoined,
    Grant,
    Hint,
    Later,
    LayerKey,
    Plan,
    Refuse,
    Release,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tierd.core.model import Event

    Sender = Callable[[Event], None]
    Timer = Callable[[int, Callable[[], None]], None]


@dataclass(frozen=True, slots=True)
class Profile:
    """How a client behaves. Probabilities are per layer."""

    model: int
    order: tuple[int, ...]
    kind: str = "cyclic"  #: an "open" one draws from its order, the first ones most often
    lookahead: int = 1
    steps: int = 40  #: layers to compute before it leaves
    compute_ns: int = 5_000_000
    start_ns: int = 0
    planless: bool = False
    releases_late: bool = False  #: releases a layer only when the next one is done
    hoards_after: int | None = None  #: from this step on it never releases
    dies_ns: int | None = None
    sleeps_after: int | None = None  #: from this step on it is silent, but stays connected
    stray_share: float = 0.0  #: asks for a layer out of its plan
    skip_share: float = 0.0  #: skips a layer of its plan
    pause_share: float = 0.0  #: computes for 100 times as long
    replan_share: float = 0.0  #: declares another order
    second_lease_share: float = 0.0  #: acquires what it holds once more
    hint_share: float = 0.0  #: says beforehand what an open plan will ask for, or thinks so
    tokens_per_pass: int = 1
    weight: int = 100
    keeps: bool = False  #: gives no lease back while nothing presses it to
    answer_ns: int = 0  #: from when it is pressed until it gives back what it keeps
    gpu: int | None = None  #: where it lives; None is DRAM


@dataclass(slots=True, eq=False)
class VirtualClient:
    """One client; the simulation delivers the machine's answers to it."""

    number: int
    profile: Profile
    rng: random.Random
    send: Sender
    after: Timer
    now: Callable[[], int]
    pressed: Callable[[], bool] = lambda: True
    index: int = 0  #: into the order
    done: int = 0  #: layers computed
    stall_ns: int = 0
    given_back: int = 0  #: leases that it kept until it was pressed
    busy: bool = False
    joined: bool = False
    gone: bool = False
    refusals: list[str] = field(default_factory=list)
    wanted: LayerKey | None = None  #: what it stalls for
    leases: dict[int, LayerKey] = field(default_factory=dict)
    asked: dict[int, tuple[LayerKey, bool]] = field(default_factory=dict)  #: open requests
    _order: tuple[int, ...] = ()
    _drawn: dict[int, int] = field(default_factory=dict)  #: an open plan's future, by index
    _late: int | None = None
    _computing: int | None = None  #: the lease that it computes with
    _requests: int = 0

    def start(self) -> None:
        self._order = self.profile.order
        self.joined = True
        self.send(ClientJoined(self.now(), self.number, self.profile.weight))
        if self.profile.dies_ns is not None:
            self.after(self.profile.dies_ns, self.leave)
        if self.profile.planless:
            self._next()
        else:
            self._declare()

    def leave(self) -> None:
        if not self.gone:
            self.gone = True
            self.send(ClientGone(self.now(), self.number))

    # ------------------------------------------------------------------------------------ answers

    def admitted(self, action: Admit) -> None:
        del action
        if not self.gone:
            self._next()

    def granted(self, action: Grant) -> None:
        key, _ = self.asked.pop(action.request)
        self.leases[action.lease] = key
        self.stall_ns += action.waited_ns
        if key == self.wanted and not self.gone:
            self._compute(action.lease)

    def told_later(self, action: Later) -> None:
        key, _ = self.asked.pop(action.request)
        if key == self.wanted and not self.gone:
            self._acquire(key)

    def refused(self, action: Refuse) -> None:
        self.refusals.append(action.code)
        if self.gone:
            return
        if action.request not in self.asked:  # the plan
            if self.done == 0 and not self.busy and self.wanted is None:
                self.leave()
            return
        key, _ = self.asked.pop(action.request)
        if action.code in ("model_removed", "budget_too_small", "not_found", "internal"):
            self.leave()
        elif key == self.wanted:
            if action.code == "lease_limit":
                if self.profile.hoards_after is not None:
                    return  # it had its chance; from now on it is silent
                if not self.leases and not self.asked and self.profile.planless:
                    self.leave()  # it has no reserve, and others may never release
                    return
                self._release_all()
            self.after(1_000_000, lambda: self._retry(key))

    def give_back(self) -> None:
        """It is pressed: what it does not compute with goes, needed last first. Also when it is
        silent: another thread than the one that computes does this."""
        if self.gone or not self.leases or not self.pressed():
            return
        soon = self._soon()
        for lease, key in reversed(list(self.leases.items())):
            if key.layer not in soon and lease not in (self._late, self._computing):
                self.given_back += 1
                self._release(lease)

    # ------------------------------------------------------------------------------------ private

    def _declare(self) -> None:
        self._requests += 1
        profile = self.profile
        self.send(
            Plan(
                self.now(),
                self.number,
                self._requests,
                profile.model,
                self._order,
                profile.kind,
                profile.lookahead,
                profile.tokens_per_pass,
            )
        )

    def _next(self) -> None:
        """Turns to the next layer of the order."""
        profile = self.profile
        if self.gone or self.busy or self.wanted is not None:
            return
        over = profile.kind == "once" and self.index >= len(self._order)
        if self.done >= profile.steps or over:
            self.leave()
            return
        if profile.sleeps_after is not None and self.done >= profile.sleeps_after:
            return
        if self.rng.random() < profile.replan_share:
            self._order = (*self._order[1:], self._order[0])
            self.index = 0
            self._declare()
        layer = self._at(self.index)
        if self.rng.random() < profile.stray_share:
            layer = self.rng.choice(self._order)
        else:
            self.index += 1
            if self.rng.random() < profile.skip_share:
                self.index += 1
        key = LayerKey(profile.model, layer)
        self.wanted = key
        for lease, held in self.leases.items():
            if held == key and lease != self._late:
                self._compute(lease)
                return
        if not any(asked == key for asked, _ in self.asked.values()):
            self._acquire(key)

    def _at(self, index: int) -> int:
        """The layer at a place in the future; an open plan draws it when it is looked at."""
        if self.profile.kind != "open":
            return self._order[index % len(self._order)]
        if index not in self._drawn:
            self._drawn = {at: layer for at, layer in self._drawn.items() if at >= self.index - 1}
            self._drawn[index] = self._order[int(self.rng.random() ** 2 * len(self._order))]
        return self._drawn[index]

    def _hint(self) -> None:
        """Names the layer after the next with some certainty, and another with less."""
        other = self.rng.choice(self._order)
        expected = self._at(self.index + 1)
        layers = (expected,) if other == expected else (expected, other)
        chances = (700_000, 300_000)[: len(layers)]
        self.send(Hint(self.now(), self.number, self.profile.model, layers, chances, 2))

    def _acquire(self, key: LayerKey, *, ahead: bool = False) -> None:
        self._requests += 1
        self.asked[self._requests] = (key, ahead)
        self.send(Acquire(self.now(), self.number, self._requests, key, ahead))

    def _retry(self, key: LayerKey) -> None:
        if self.gone or key != self.wanted:
            return
        if not any(asked == key for asked, _ in self.asked.values()):
            self._acquire(key)

    def _compute(self, lease: int) -> None:
        profile = self.profile
        self.wanted = None
        self.busy = True
        self._computing = lease
        compute_ns = profile.compute_ns
        if self.rng.random() < profile.pause_share:
            compute_ns *= 100
        self.after(compute_ns, lambda: self._computed(lease))
        if self.rng.random() < profile.second_lease_share:
            self._acquire(self.leases[lease], ahead=True)
        if profile.hint_share and self.rng.random() < profile.hint_share:
            self._hint()
        for step in range(profile.lookahead):
            index = self.index + step
            if index >= len(self._order) and profile.kind == "once":
                break
            key = LayerKey(profile.model, self._at(index))
            known = [*self.leases.values(), *(asked for asked, _ in self.asked.values())]
            if key not in known:
                self._acquire(key, ahead=True)

    def _computed(self, lease: int) -> None:
        if self.gone:
            return
        self.busy = False
        self._computing = None
        self.done += 1
        profile = self.profile
        keeps = profile.keeps and not self.pressed()
        if not keeps and (profile.hoards_after is None or self.done < profile.hoards_after):
            if profile.releases_late:
                lease, self._late = self._late or 0, lease
            if lease in self.leases:
                self._release(lease)
            self._release_strays()
        self._next()

    def _soon(self) -> set[int]:
        """The layers that it comes to next."""
        return {self._at(self.index + step) for step in range(self.profile.lookahead + 1)}

    def _release_strays(self) -> None:
        """Gives up leases of layers that it will not come to soon."""
        soon = self._soon()
        for lease, key in list(self.leases.items()):
            if key.layer not in soon and lease != self._late:
                self._release(lease)

    def _release_all(self) -> None:
        self._late = None
        for lease in list(self.leases):
            self._release(lease)

    def _release(self, lease: int) -> None:
        del self.leases[lease]
        self.send(Release(self.now(), self.number, lease))
