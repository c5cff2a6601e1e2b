"""What `tierctl status` shows: the daemon, and a row for each of its tiers and devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd_tools.quantities import duration, size
from tierd_tools.terminal import table

if TYPE_CHECKING:
    from tierd_tools.terminal import Reply


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
    table(("", ""), lines)


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
