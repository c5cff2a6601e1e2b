"""What a daemon has: its models, their layers, its clients and settings, a row for each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd_tools.quantities import duration, size
from tierd_tools.terminal import say, table

if TYPE_CHECKING:
    from tierd_tools.terminal import Reply


def models(reply: Reply) -> None:
    rows = [
        (
            model["name"],
            model["state"],
            f"{model['resident_layers']}/{model['layers']}",
            size(model["pack_bytes"]),
            size(model["dense_bytes"]),
            str(model["clients"]),
            model["path"],
        )
        for model in reply["models"]
    ]
    table(
        ("MODEL", "STATE", "RESIDENT", "PACK", "DENSE", "CLIENTS", "PATH"),
        rows,
        right=("RESIDENT", "PACK", "DENSE", "CLIENTS"),
    )


def layers(reply: Reply) -> None:
    gpus = sorted({name for layer in reply["layers"] for name in layer["gpus"]})
    rows = [
        (
            layer["name"],
            layer["state"] + (", pinned" if layer["pinned"] else ""),
            size(layer["bytes"]),
            str(layer["leases"]),
            "-" if layer["slot"] is None else f"{layer['slot']}/{layer['generation']}",
            "-" if layer["next_use"] is None else str(layer["next_use"]),
            *(_on_gpu(layer["gpus"].get(name)) for name in gpus),
        )
        for layer in reply["layers"]
    ]
    table(
        (
            *("LAYER", "STATE", "SIZE", "LEASES", "SLOT/GENERATION", "NEXT USE"),
            *(name.upper() for name in gpus),
        ),
        rows,
        right=("SIZE", "LEASES", "SLOT/GENERATION", "NEXT USE"),
    )


def _on_gpu(found: Reply | None) -> str:
    """A layer's state on one GPU."""
    if found is None:
        return "-"
    leases = f", {found['leases']} leases" if found["leases"] else ""
    return f"{found['state']}{leases}"


def clients(reply: Reply) -> None:
    """Who is connected and what it holds; below, what it does and how long it waits."""
    if not reply["clients"]:
        say("no client is connected")
        return
    holding = [
        (
            str(client["client"]),
            client["name"],
            f"{client['pid']}/{client['uid']}",
            client["model"] or "-",
            client["tier"]
            + (f" (+{size(client['scratch_bytes'])})" if client["scratch_bytes"] else ""),
            f"{client['leases']} ({size(client['leased_bytes'])})",
            size(client["reserved_bytes"]),
            duration(client["connected_ns"]),
        )
        for client in reply["clients"]
    ]
    table(
        ("CLIENT", "NAME", "PID/UID", "MODEL", "TIER", "LEASES", "RESERVED", "CONNECTED"),
        holding,
        right=("CLIENT", "LEASES", "RESERVED", "CONNECTED"),
    )
    working = [
        (
            str(client["client"]),
            "-" if client["plan"] is None else f"{client['plan']}, {client['tokens_per_pass']}",
            "-" if client["position"] is None else str(client["position"]),
            str(client["granted"]),
            f"{client['weight']}: {size(client['read_bytes'])}",
            duration(client["stall_ns"]),
            _predicted(client["predicted"]),
        )
        for client in reply["clients"]
    ]
    say("")
    table(
        (
            *("CLIENT", "PLAN, TOKENS", "POSITION", "GRANTED", "WEIGHT: READ", "STALL"),
            "PREDICTED STALL",
        ),
        working,
        right=("CLIENT", "POSITION", "GRANTED", "WEIGHT: READ", "STALL"),
    )


def _predicted(found: Reply | None) -> str:
    """Stall of a pass, time of a token, and what that waits for."""
    if found is None:
        return "-"
    return (
        f"{duration(found['stall_ns'])} a pass, {duration(found['ns_per_token'])} a token "
        f"({found['binds']})"
    )


def config(reply: Reply) -> None:
    rows = [(row["key"], str(row["value"]), row["source"]) for row in reply["config"]]
    table(("KEY", "VALUE", "SOURCE"), rows)
