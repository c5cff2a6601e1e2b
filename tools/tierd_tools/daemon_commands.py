"""The commands of tierctl that ask a daemon, and are shown what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tierd.sizes import parse_size
from tierd_tools.command_line import add_socket, asked_model
from tierd_tools.diagnostics import ask
from tierd_tools.errors import BadSetting

if TYPE_CHECKING:
    import argparse

    from tierd_tools.command_line import Command
    from tierd_tools.terminal import Reply

_OF_A_MODEL = ("layers", "pin", "unpin", "evict")


def add(command: Command) -> None:
    """Add the commands."""
    for name, about in (
        ("status", "Show the daemon, its tiers and what it has done."),
        ("models", "List the models that the daemon serves."),
        ("layers", "List the layers of a model and where they are."),
        ("clients", "List the connected clients, their plans and leases."),
        ("config", "Show every setting in effect and where it came from."),
        ("pin", "Keep layers of a model in memory, all or those named."),
        ("unpin", "Let pinned layers go again, all of a model or those named."),
        ("evict", "Empty layers of a model that nobody holds, all or those named."),
        ("reload", "Look for added, replaced and removed packs."),
    ):
        sub = command(name, _ask, about)
        add_socket(sub)
        if name in _OF_A_MODEL:
            sub.add_argument("model")
        if name in ("pin", "unpin", "evict"):
            sub.add_argument("layers", nargs="*", metavar="LAYER", help="a name or a glob")
    budget = command("budget", _budget, "Change the budget of a tier while the daemon runs.")
    budget.add_argument("tier", help="dram, or gpu:N")
    budget.add_argument("size", metavar="SIZE", help="e.g. 20GiB")
    add_socket(budget)


def _ask(arguments: argparse.Namespace) -> Reply:
    fields: dict[str, Any] = {}
    if arguments.command in _OF_A_MODEL:
        fields["model"] = asked_model(arguments)
    if layers := getattr(arguments, "layers", None):
        fields["layers"] = layers
    return ask(arguments.socket, arguments.command, **fields)


def _budget(arguments: argparse.Namespace) -> Reply:
    try:
        nbytes = parse_size(arguments.size)
    except ValueError as error:
        raise BadSetting(f"budget: {error}") from error
    return ask(arguments.socket, "budget", tier=arguments.tier, bytes=nbytes)
