"""`python -m tierd.sim --seed N`: one simulated run, or `--runs` of them, and what they came to.

With `--scale` the runs are long ones of three tiers: many clients, models and GPUs (`fleet`).
"""

from __future__ import annotations

import argparse
import sys
import time

from tierd.core.errors import CoreError
from tierd.sim.errors import BrokenPromise
from tierd.sim.fleet import Size, drawn_fleet
from tierd.sim.fleet_simulation import FleetSimulation
from tierd.sim.scenario import drawn
from tierd.sim.simulation import Simulation

FULL_EVERY = 1_000
SIZES = ("clients", "models", "gpus", "layers", "events", "chunk_mib")


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 if a promise was broken."""
    args = _parser().parse_args(argv)
    run = run_fleet if args.scale else run_scenario
    for seed in range(args.seed, args.seed + args.runs):
        began = time.perf_counter()
        try:
            events, summary = run(seed, args)
        except (BrokenPromise, CoreError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            print(f"replay: {replay_command(seed, **what_decides(args))}", file=sys.stderr)
            return 1
        seconds = time.perf_counter() - began
        print(f"{summary}, {seconds:.1f} s, {events / seconds:,.0f} events/s")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tierd.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the (first) seed")
    parser.add_argument("--runs", type=int, default=1, help="consecutive seeds to run")
    parser.add_argument("--clients", type=int, help="how many clients at once")
    parser.add_argument("--steps", type=int, help="layers that each client computes (no --scale)")
    parser.add_argument("--no-check", action="store_true", help="only the cheap checks")
    parser.add_argument("--story", action="store_true", help="print every decision (no --scale)")
    parser.add_argument("--scale", action="store_true", help="three tiers, at scale")
    parser.add_argument("--events", type=int, help="of a run with --scale")
    parser.add_argument("--models", type=int, help="with --scale")
    parser.add_argument("--gpus", type=int, help="with --scale")
    parser.add_argument("--layers", type=int, help="of the longest model, with --scale")
    parser.add_argument("--chunk-mib", type=int, help="of every GPU, with --scale")
    parser.add_argument(
        "--full-every", type=int, default=FULL_EVERY, help="events between full checks"
    )
    return parser


def run_scenario(seed: int, args: argparse.Namespace) -> tuple[int, str]:
    """One small run of one tier: how many events it had, and what it came to."""
    scenario = drawn(seed, clients=args.clients, steps=args.steps)
    simulation = Simulation(scenario, check=not args.no_check)
    summary = simulation.run()
    story = [str(decision) for decision in simulation.machine.story()] if args.story else []
    return simulation.events, "\n".join([*story, str(summary)])


def run_fleet(seed: int, args: argparse.Namespace) -> tuple[int, str]:
    """One run at scale: how many events it had, and what it came to."""
    chosen = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    full_every = sys.maxsize if args.no_check else args.full_every
    simulation = FleetSimulation(drawn_fleet(seed, Size(**chosen)), full_every=full_every)
    summary = simulation.run()
    return simulation.events, str(summary)


def what_decides(args: argparse.Namespace) -> dict[str, object]:
    """The options that change what happens, beside the seed."""
    names = ("scale", "clients", "steps", *SIZES[1:], "no_check")
    chosen = {name: getattr(args, name) for name in names}
    return chosen | ({"full_every": args.full_every} if args.full_every != FULL_EVERY else {})


def replay_command(seed: int, **options: object) -> str:
    """The command that runs exactly this again."""
    command = f"python -m tierd.sim --seed {seed}"
    for name, value in options.items():
        flag = f" --{name.replace('_', '-')}"
        if value is True:
            command += flag
        elif value is not None and value is not False:
            command += f"{flag} {value}"
    return command


if __name__ == "__main__":
    sys.exit(main())
