"""The commands of tierctl about the record of all decisions: why, trace, replay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierd_tools.command_line import add_socket, asked_model
from tierd_tools.errors import BadSetting

if TYPE_CHECKING:
    import argparse

    from tierd_tools.command_line import Command
    from tierd_tools.terminal import Reply


def add(command: Command) -> None:
    """Add the commands."""
    why = command("why", _why, "Say in a sentence why a layer is where it is.")
    why.add_argument("model")
    why.add_argument("layer", help="its name, or its number")
    why.add_argument("--tier", default="dram", help="dram (default), or gpu:N")
    why.add_argument("--history", action="store_true", help="print what was decided about it, too")
    trace = command("trace", _trace, "Write what was decided, for Perfetto and for replay.")
    trace.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    trace.add_argument(
        "--seconds", type=float, default=0.0, metavar="N",
        help="record on for so long; default: what the daemon remembers",
    )  # fmt: skip
    for sub in (why, trace):
        add_socket(sub)
    replay = command("replay", _replay, "Run a recorded day against other budgets and policies.")
    replay.add_argument("trace", type=Path, metavar="TRACE", help="a file of `tierctl trace`")
    replay.add_argument(
        "--policy", action="append", default=[], metavar="POLICY",
        choices=("next-use", "lru", "lfu", "mru", "pin-first-n", "min"),
        help="next-use (tierd), lru, lfu, mru, pin-first-n, or min (the bound); default: all",
    )  # fmt: skip
    replay.add_argument(
        "--dram", action="append", default=[], metavar="SIZE", help="a budget; default: as recorded"
    )
    replay.add_argument(
        "--tier", default="dram",
        help="whose day: dram (default), or gpu:N: its reads are copies, --dram is its budget",
    )  # fmt: skip
    replay.add_argument(
        "--ssd-bandwidth", metavar="BANDWIDTH", help="e.g. 3GB/s; default: of the recorded reads"
    )


def _why(arguments: argparse.Namespace) -> Reply:
    from tierd_tools import why

    model = asked_model(arguments)
    reply = why.why(arguments.socket, model, arguments.layer, arguments.tier)
    if not (arguments.history or arguments.json):
        del reply["history"]
    return reply


def _trace(arguments: argparse.Namespace) -> Any:
    from tierd_tools import trace

    if not 0 <= arguments.seconds < 1e6:
        raise BadSetting(f"--seconds {arguments.seconds} is not a number from 0 to 1000000")
    return trace.trace(arguments.socket, arguments.output, arguments.seconds)


def _replay(arguments: argparse.Namespace) -> Reply:
    from tierd_tools import replay

    return replay.run(
        arguments.trace, arguments.policy, arguments.dram, arguments.ssd_bandwidth, arguments.tier
    )
