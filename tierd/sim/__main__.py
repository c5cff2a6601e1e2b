"""`python -m tierd.sim --seed N`: one simulated run, or `--runs` of them, and what they came to."""

from __future__ import annotations

import argparse
import sys
import time

from tierd.core.errors import CoreError
from tierd.sim.errors import BrokenPromise
from tierd.sim.scenario import drawn
from tierd.sim.simulation import Simulation


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tierd.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the (first) seed")
    parser.add_argument("--runs", type=int, default=1, help="consecutive seeds to run")
    parser.add_argument("--clients", type=int, help="how many clients (default: drawn)")
    parser.add_argument("--steps", type=int, help="layers that each client computes")
    parser.add_argument("--no-check", action="store_true", help="only the world's checks")
    parser.add_argument("--story", action="store_true", help="print every decision")
    args = parser.parse_args(argv)
    for seed in range(args.seed, args.seed + args.runs):
        scenario = drawn(seed, clients=args.clients, steps=args.steps)
        simulation = Simulation(scenario, check=not args.no_check)
        began = time.perf_counter()
        try:
            summary = simulation.run()
        except (BrokenPromise, CoreError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            print(f"replay: {replay_command(seed, args.clients, args.steps)}", file=sys.stderr)
            return 1
        seconds = time.perf_counter() - began
        print(f"{summary}, {simulation.events / seconds:,.0f} events/s")
        if args.story:
            print(*simulation.machine.story(), sep="\n")
    return 0


def replay_command(seed: int, clients: int | None = None, steps: int | None = None) -> str:
    """The command that runs exactly this again."""
    options = [("--clients", clients), ("--steps", steps)]
    chosen = "".join(f" {name} {value}" for name, value in options if value is not None)
    return f"python -m tierd.sim --seed {seed}{chosen}"


if __name__ == "__main__":
    sys.exit(main())
