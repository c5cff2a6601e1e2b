"""What one client will ask for next, and when.

A position is an index into the plan's order; a layer may occur in it several times. The next use of
a layer is expected `compute_ns * distance` after the client's last sign of life, as a *wait*:

    wait(layer) = (now - last_ns) + compute_ns * distance(layer)

so a client that has been silent for an hour is expected to stay silent for another hour, and does
not pin what others need. `now` is the same for all, so comparing waits needs no clock: the *due*
value `compute_ns * distance - last_ns` orders them, and changes only with the client's own events.

What a client computes and what it waits are measured apart. Only the first counts in due values:
were the second counted too, a client that stalls would look slow, its layers far away, they would
be evicted, and it would stall more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd.core.model import Hint
    from tierd.core.orders import Order
    from tierd.core.reuse import Reuse

DEFAULT_STEP_NS = 10_000_000  #: until the client was seen to step
LONGEST_STEP_NS = 1_000_000_000
SHORTEST_STEP_NS = 1_000
NEVER = 1 << 62  #: the due value of a layer that nobody will ask for


class PlanState:
    """One client's plan and how far it is."""

    __slots__ = (
        "compute_ns",
        "cyclic",
        "hints",
        "kept_at",
        "kind",
        "last_ns",
        "lookahead",
        "model",
        "order",
        "pass_compute_ns",
        "passed",
        "passed_ns",
        "position",
        "reuse",
        "route",
        "stalled_ns",
        "stepped_ns",
        "steps",
        "tokens_per_pass",
        "wait_ns",
    )

    def __init__(
        self,
        model: int,
        order: Order,
        *,
        kind: str,
        lookahead: int,
        at_ns: int,
        tokens_per_pass: int = 1,
        reuse: Reuse | None = None,
    ) -> None:
        self.model = model
        self.route = order
        self.order = order.layers
        self.kind = kind
        self.cyclic = kind == "cyclic"
        self.tokens_per_pass = tokens_per_pass
        self.lookahead = lookahead
        self.position = -1  #: index of the layer that was asked for last; -1 before the first
        self.steps = 0  #: layers asked for
        self.kept_at = 0  #: the step at which `retention` was last asked
        self.last_ns = at_ns  #: the client's last sign of life
        self.stepped_ns: int | None = None  #: when it last asked for another layer
        self.compute_ns = DEFAULT_STEP_NS  #: running mean of a step, without what it stalled
        self.wait_ns = 0  #: running mean of what it stalls for in a step
        self.stalled_ns = 0  #: in the present step
        self.pass_compute_ns: int | None = None  #: of a pass, without stalls; None before the first
        self.passed = 0  #: steps of the pass that is being measured
        self.passed_ns = 0  #: what it has computed so far
        self.reuse = reuse  #: of the model's layers, for an open plan
        self.hints: dict[int, tuple[int, int]] = {}  #: by layer: step of its use, probability

    @property
    def step_ns(self) -> int:
        """The time from one layer to the next, with what the client waits for."""
        return self.compute_ns + self.wait_ns

    def uses(self, layer: int) -> bool:
        return layer in self.route.indices

    def layers(self) -> Sequence[int]:
        """Each layer of the plan once, by its first occurrence."""
        return list(self.route.indices)

    def distance(self, layer: int) -> int | None:
        """Steps from here to the next use of `layer`, at least 1; None if it is not used again,
        or nobody can say because the plan is open."""
        if self.kind == "open":
            return None
        route = self.route
        index = route.only.get(layer)
        if index is not None:
            steps = index - self.position
            if steps > 0:
                return steps
            return steps + route.length if self.cyclic else None
        return route.next(layer, self.position, cyclic=self.cyclic)

    def due(self, layer: int) -> int:
        """Orders layers by expected next use: larger is later."""
        if self.reuse is not None:
            steps = self._expected(layer, self.reuse)
            return self.compute_ns * steps - self.last_ns
        distance = self.distance(layer)
        return NEVER if distance is None else self.compute_ns * distance - self.last_ns

    def _expected(self, layer: int, reuse: Reuse) -> int:
        """Steps of an open plan until `layer` is asked for: what its hint or its past says."""
        hint = self.hints.get(layer)
        steps = reuse.expected_steps(layer)
        if hint is not None and hint[0] > self.steps:
            # If it is not used then, it is as far away as before.
            at, ppm = hint
            hinted = (at - self.steps) * ppm + (1_000_000 - ppm) * steps
            steps = min(steps, hinted // 1_000_000)
        return max(steps, 1)

    def ahead(self, steps: int) -> int | None:
        """The layer `steps` after the position; None beyond the end of a plan that is no cycle."""
        if self.kind == "open":
            return None
        index = self.position + steps
        if index >= len(self.order):
            if not self.cyclic:
                return None
            index %= len(self.order)
        return self.order[index]

    def hint(self, hint: Hint) -> None:
        """What the client of an open plan says about its next uses."""
        at = self.steps + hint.steps
        self.hints = {
            layer: said for layer, said in self.hints.items() if said[0] > self.steps != at
        }
        for layer, ppm in zip(hint.layers, hint.probabilities_ppm, strict=True):
            if layer in self.route.indices:
                self.hints[layer] = (at, ppm)

    def waited(self, stall_ns: int) -> None:
        """The client stalled in the present step."""
        self.stalled_ns += stall_ns

    def advance(self, layer: int, at_ns: int) -> None:
        """The client asked for `layer`; a layer outside the plan leaves the position as it is."""
        if self.reuse is not None:
            if layer not in self.route.indices:
                return
            self.reuse.used(layer)
            self.hints.pop(layer, None)
            self.position = self.route.indices[layer][0]
            distance = 1
        else:
            found = self.distance(layer)
            if found is None:
                return
            distance = found
            self.position = (self.position + distance) % len(self.order)
        self.steps += 1
        if self.stepped_ns is not None and (distance < len(self.order) or self.reuse is not None):
            self._measure(at_ns - self.stepped_ns, distance)
        self.stepped_ns = at_ns
        self.stalled_ns = 0

    def _measure(self, elapsed_ns: int, distance: int) -> None:
        """One layer took so long. Who skips layers is not faster for it: its next ones are expected
        later than they may come, which costs this client alone."""
        stalled = min(self.stalled_ns, elapsed_ns)
        longest = min(LONGEST_STEP_NS, 8 * self.compute_ns)
        sample = min(max(elapsed_ns - stalled, SHORTEST_STEP_NS), longest)
        # A mean of samples that are no shorter than the shortest is none either.
        self.compute_ns += (sample - self.compute_ns) // 8
        self.passed += distance
        self.passed_ns += sample
        if self.passed >= len(self.order):
            # Steps differ (a head is larger than a decoder layer), passes do not.
            before = self.pass_compute_ns
            self.pass_compute_ns = (
                self.passed_ns if before is None else (before + self.passed_ns) // 2
            )
            self.passed = self.passed_ns = 0
        waited = min(stalled, LONGEST_STEP_NS)
        self.wait_ns += (waited - self.wait_ns) // 8
