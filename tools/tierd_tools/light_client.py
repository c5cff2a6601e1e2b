"""A client that takes every lease that a model would take, and sleeps in place of computing.

python -m tierd_tools.light_client --socket PATH --model NAME --compute 0.004 --seconds 10

Where four real models do not fit beside each other on few cores, four of these do, and the daemon
sees no difference. Prints one JSON line: {"layers", "at_s", "stall_s"}, the last two per layer, on
the monotonic clock of this machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import deque
from typing import TYPE_CHECKING

import tierd_client

if TYPE_CHECKING:
    from tierd_client import Lease, OpenedModel, PendingLease


class LightClient:
    """One pass after the other over all layers of a model."""

    def __init__(self, opened: OpenedModel, compute_s: float, lookahead: int) -> None:
        self.layers = len(opened.index.layers)
        self.at_s: list[float] = []
        self.stall_s: list[float] = []
        self._opened = opened
        self._compute_s = compute_s
        self._lookahead = lookahead
        self._ahead: deque[PendingLease] = deque()
        opened.plan(range(self.layers), lookahead=lookahead)

    def run(self, seconds: float) -> None:
        """Goes on for so long, then gives everything back."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._step()
        self._give_up_ahead()

    def run_layers(self, count: int) -> None:
        """Goes through so many layers, and keeps what it has asked for ahead."""
        for _ in range(count):
            self._step()

    def _step(self) -> None:
        begin, step = time.monotonic(), len(self.at_s)
        lease = self._take(step)
        self.at_s.append(time.monotonic())
        self.stall_s.append(self.at_s[-1] - begin)
        while len(self._ahead) < self._lookahead:
            following = (step + 1 + len(self._ahead)) % self.layers
            self._ahead.append(self._opened.acquire_ahead(following))
        time.sleep(self._compute_s)
        lease.release()

    def _take(self, step: int) -> Lease:
        layer = step % self.layers
        try:
            return self._ahead.popleft().resolve() if self._ahead else self._opened.acquire(layer)
        except tierd_client.LeaseLimit:
            self._give_up_ahead()  # what it holds ahead is all that it may hold
            return self._opened.acquire(layer)

    def _give_up_ahead(self) -> None:
        while self._ahead:
            try:
                self._ahead.popleft().resolve().release()
            except tierd_client.LeaseLimit:
                continue


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--compute", type=float, required=True, help="seconds a layer")
    parser.add_argument("--tier", default="dram", help="or gpu:N, of a memfd device")
    parser.add_argument("--lookahead", type=int, default=1)
    parser.add_argument("--start", type=float, default=0.0, help="seconds to wait before")
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args()
    time.sleep(args.start)
    name = f"light-{args.model}"
    with tierd_client.Client(args.socket, name=name, tier=args.tier) as client:
        light = LightClient(client.open(args.model), args.compute, args.lookahead)
        light.run(args.seconds)
    print(json.dumps({"layers": light.layers, "at_s": light.at_s, "stall_s": light.stall_s}))


if __name__ == "__main__":
    main()
