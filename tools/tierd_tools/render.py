"""Tables for humans of what the daemon answers: binary units, times in the largest that fits."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Reply = dict[str, Any]
LOG_WIDTH = 120


def size(nbytes: int) -> str:
    """`3.1 GiB`; whole numbers below 1 KiB."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{nbytes} B" if unit == "B" else f"{value:,.1f} {unit}"


def duration(ns: int) -> str:
    """`1.5 ms`, `12.0 s`, `3 h 05 min`."""
    for limit, divisor, unit in (
        (10**6, 10**3, "us"),
        (10**9, 10**6, "ms"),
        (60 * 10**9, 10**9, "s"),
    ):
        if ns < limit:
            return f"{ns / divisor:.1f} {unit}"
    minutes = ns // (60 * 10**9)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def printable(text: str) -> str:
    """Names come from clients and directories: nothing in them may command a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _say(line: str, *, soft_wrap: bool = False) -> None:
    _console().print(printable(line), soft_wrap=soft_wrap)


def _console() -> Console:
    return Console(
        file=sys.stdout, width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False,
        markup=False, emoji=False,
    )  # fmt: skip


def _table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    _console().print(table)


def status(reply: Reply) -> None:
    daemon, dram, ssd, counts = reply["daemon"], reply["dram"], reply["ssd"], reply["scheduler"]
    limit = ssd["bandwidth_limit"]
    asked = counts["hits"] + counts["misses"]
    lines = [
        (
            "daemon",
            f"{daemon['version']}, pid {daemon['pid']} ({daemon['user']}), up "
            f"{duration(daemon['uptime_ns'])}, {size(daemon['rss_bytes'])} of its own",
        ),
        ("socket", daemon["socket"]),
        (
            "dram",
            f"{size(dram['used_bytes'])} of {size(dram['budget_bytes'])} used "
            f"(peak {size(dram['peak_bytes'])}), {size(dram['leased_bytes'])} leased, "
            f"{size(dram['in_flight_bytes'])} in flight",
        ),
        (
            "memory",
            f"{dram['pages']}, {size(dram['populated_bytes'])} populated, "
            f"{size(dram['locked_bytes'])} locked, {size(dram['quarantined_bytes'])} quarantined",
        ),
        (
            "ssd",
            f"{size(ssd['read_bytes'])} in {ssd['reads']} reads, {ssd['failed']} failed, busy "
            f"{duration(ssd['busy_ns'])}, " + (f"limit {size(limit)}/s" if limit else "no limit"),
        ),
        *((f"device {device['device']}", _device(device)) for device in ssd["devices"]),
        *((gpu["tier"], gpu_row(gpu)) for gpu in reply["gpus"]),
        (
            "leases",
            f"{counts['grants']} granted, {counts['later']} put off, {counts['refusals']} refused; "
            + (f"{counts['hits'] / asked:.1%} were resident" if asked else "none asked yet"),
        ),
        ("stall", f"{duration(counts['stall_ns'])} over all clients"),
        ("serving", f"{reply['models']} models, {reply['clients']} clients"),
    ]
    lines += [("note", note) for note in reply["notes"]]
    _table(("", ""), lines)


def _device(device: Reply) -> str:
    """What a device gives, how it is read, and what of that the operator has set."""
    how = (
        f"{device['readers']} reads of {size(device['read_chunk'])}, "
        f"{device['reads_in_flight']} layers at once"
    )
    if device["given"]:
        how += f" ({', '.join(device['given'])} as set)"
    if device["bytes_per_s"] is None:
        return f"{how}; {device['note']}"
    ahead = device["lookahead_bytes"]
    return (
        f"{size(device['bytes_per_s'])}/s, {duration(device['latency_ns'])} latency, {how}"
        + (f", {size(ahead)} ahead" if ahead is not None else "")
        + f"; {device['note']}, corrected {device['observations']} times by real reads"
    )


def gpu_row(gpu: Reply) -> str:
    """What a GPU is, holds and was copied; of one that does not work, why."""
    if gpu["state"] != "ready":
        return f"{gpu['device']}, {gpu['state']}" + (f": {gpu['reason']}" if gpu["reason"] else "")
    above, speed = gpu["above_budget_bytes"], gpu["copy_bytes_per_s"]
    asked = gpu["hits"] + gpu["misses"]
    return (
        f"{gpu['name']} ({gpu['device']}): {size(gpu['used_bytes'])} of "
        f"{size(gpu['budget_bytes'])} used"
        + (f" ({size(above)} above, goes as leases end)" if above else "")
        + f", {size(gpu['resident_bytes'])} resident, {size(gpu['leased_bytes'])} leased, "
        f"{size(gpu['in_flight_bytes'])} in flight; {size(gpu['backed_bytes'])} taken in chunks of "
        f"{size(gpu['chunk_bytes'])}, clients use {size(gpu['clients_scratch_bytes'])} beside; "
        f"{size(gpu['copied_bytes'])} in {gpu['copies']} copies"
        + (f" at {size(speed)}/s" if speed else "")
        + (f", {size(gpu['unpinned_bytes'])} not pinned" if gpu["unpinned_bytes"] else "")
        + (f", {gpu['copies_failed']} failed" if gpu["copies_failed"] else "")
        + (f"; {_past_dram(gpu['direct'])}" if gpu["direct"] else "")
        + (f"; of {asked} layers asked for {gpu['hits'] / asked:.1%} were there" if asked else "")
        + (f"; {gpu['reason']}" if gpu["reason"] else "")
    )


def _past_dram(direct: Reply) -> str:
    """What came straight from the SSD, by our count and by cuFile's."""
    return (
        f"{size(direct['bytes'])} in {direct['layers']} layers past DRAM, of all GPUs cuFile "
        f"counts {size(direct['cufile_bytes'])} in {direct['cufile_direct_reads']} direct reads "
        f"and {direct['cufile_posix_reads']} through DRAM"
        + (f", {direct['failed']} layers failed" if direct["failed"] else "")
    )


def _predicted(found: Reply | None) -> str:
    """Stall of a pass, time of a token, and what that waits for."""
    if found is None:
        return "-"
    return (
        f"{duration(found['stall_ns'])} a pass, {duration(found['ns_per_token'])} a token "
        f"({found['binds']})"
    )


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
    _table(
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
    _table(
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
    _table(
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
    _say("")
    _table(
        (
            *("CLIENT", "PLAN, TOKENS", "POSITION", "GRANTED", "WEIGHT: READ", "STALL"),
            "PREDICTED STALL",
        ),
        working,
        right=("CLIENT", "POSITION", "GRANTED", "WEIGHT: READ", "STALL"),
    )


def config(reply: Reply) -> None:
    rows = [(row["key"], str(row["value"]), row["source"]) for row in reply["config"]]
    _table(("KEY", "VALUE", "SOURCE"), rows)


def reload(reply: Reply) -> None:
    changed = False
    for what in ("added", "replaced", "removed"):
        for name in reply[what]:
            changed = True
            _say(f"{what} {name}")
    for failure in reply["failed"]:
        changed = True
        _say(f"failed {failure['name']}: {failure['text']}")
    if not changed:
        _say("nothing changed")


def pin(reply: Reply) -> None:
    _commanded("pinned", reply)


def unpin(reply: Reply) -> None:
    _commanded("unpinned", reply)


def evict(reply: Reply) -> None:
    _commanded("evicted", reply)


def budget(reply: Reply) -> None:
    above = max(reply["used_bytes"] - reply["budget_bytes"], 0)
    _say(
        f"the budget is {size(reply['budget_bytes'])}, {size(reply['used_bytes'])} are used"
        + (f"; {size(above)} go back as leases end" if above else "")
    )


def _commanded(what: str, reply: Reply) -> None:
    count = len(reply["layers"])
    _say(f"{what} {count} layer{'' if count == 1 else 's'}, {size(reply['bytes'])}")
    for kept in reply["kept"]:
        _say(f"{kept['layer']} stays: {kept['text']}")


def why(reply: Reply) -> None:
    _say(reply["sentence"], soft_wrap=True)
    rows = [
        (f"{duration(told['ago_ns'])} ago", told["what"], told["text"])
        for told in reply.get("history", ())
    ]
    if rows:
        _table(("WHEN", "WHAT", "WHY"), rows)
    if "history" in reply:
        record = reply["record"]
        reaches = record["reaches_ns"]
        _say(
            "the record is empty"
            if reaches is None
            else f"the record reaches back {duration(reaches)}; "
            f"{record['forgotten_events']} older events are forgotten"
        )


def replay(reply: Reply) -> None:
    def times(row: Reply, key: str) -> str:
        bound = ">= " if row["policy"] == "min" else ""
        return bound + duration(row[key])

    rows = [
        (
            row["policy"],
            size(row["budget_bytes"]),
            f"{row['hit_ratio']:.1%}",
            size(row["read_bytes"]),
            "-" if row["in_time"] is None else f"{row['in_time']}/{row['uses']}",
            times(row, "stall_ns"),
            times(row, "elapsed_ns"),
        )
        for row in reply["rows"]
    ]
    headings = ("POLICY", "DRAM", "HITS", "READ", "IN TIME", "STALL", "ELAPSED")
    bandwidth = {row["bandwidth"] for row in reply["rows"]}
    _say(
        f"{reply['trace']}: {reply['events']} events over {duration(int(reply['seconds'] * 1e9))}, "
        f"at {' and '.join(size(rate) for rate in bandwidth)}/s; memory is empty at the begin"
    )
    _table(headings, rows, right=headings[1:])
    for text in dict.fromkeys(text for row in reply["rows"] for text in row["refused"]):
        _say(f"left out: {text}", soft_wrap=True)


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
