"""What people are shown of each command's reply; here those that change something."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd_tools.listings import clients, config, layers, models
from tierd_tools.quantities import size
from tierd_tools.record_tables import replay, why
from tierd_tools.status_table import status
from tierd_tools.terminal import say

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_tools.terminal import Reply


def reload(reply: Reply) -> None:
    changed = False
    for what in ("added", "replaced", "removed"):
        for name in reply[what]:
            changed = True
            say(f"{what} {name}")
    for failure in reply["failed"]:
        changed = True
        say(f"failed {failure['name']}: {failure['text']}")
    if not changed:
        say("nothing changed")


def pin(reply: Reply) -> None:
    _commanded("pinned", reply)


def unpin(reply: Reply) -> None:
    _commanded("unpinned", reply)


def evict(reply: Reply) -> None:
    _commanded("evicted", reply)


def _commanded(what: str, reply: Reply) -> None:
    count = len(reply["layers"])
    say(f"{what} {count} layer{'' if count == 1 else 's'}, {size(reply['bytes'])}")
    for kept in reply["kept"]:
        say(f"{kept['layer']} stays: {kept['text']}")


def budget(reply: Reply) -> None:
    above = max(reply["used_bytes"] - reply["budget_bytes"], 0)
    say(
        f"the budget is {size(reply['budget_bytes'])}, {size(reply['used_bytes'])} are used"
        + (f"; {size(above)} go back as leases end" if above else "")
    )


TABLES: dict[str, Callable[[Reply], None]] = {
    "status": status,
    "models": models,
    "layers": layers,
    "clients": clients,
    "config": config,
    "reload": reload,
    "pin": pin,
    "unpin": unpin,
    "evict": evict,
    "budget": budget,
    "why": why,
    "replay": replay,
}
