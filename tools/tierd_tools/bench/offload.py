"""Is tierd faster per token than Accelerate's disk offload under the same memory cap?

The demo's comparison, with the bounds that the project promises.
"""

from __future__ import annotations

from typing import Any

from tierd_tools.benchmark import Row
from tierd_tools.demo import __main__ as demo


def run() -> list[Row]:
    result = demo.run(demo.parser().parse_args([]))
    rows = {(row["name"], row["compute"]): row for row in result["rows"]}
    accelerate = rows["accelerate", "dense"]
    uncapped = None if result["cap_enforced"] else "no memory cgroup can be written here"
    judged: list[Row] = []
    for (name, compute), row in rows.items():
        if name == "accelerate":
            continue
        judged.append(
            Row(
                row=f"{name} {compute} against Accelerate, seconds per token",
                ours=row["seconds_per_token"],
                theirs=accelerate["seconds_per_token"],
                unit="s/token",
                at_least=4.0 if (name, compute) == ("tierd-1", "fused") else None,
                not_applicable=uncapped,
                invert=True,
            )
        )
    return [*judged, *_bytes(result, rows), *_throughput(result, uncapped)]


def _bytes(result: dict[str, Any], rows: dict[tuple[str, str], dict[str, Any]]) -> list[Row]:
    """SSD bytes per token <= pack - budget + 3 of the largest decoder layers."""
    fused = rows["tierd-1", "fused"]
    bound = result["pack_bytes"] - result["dram_budget_bytes"] + 3 * result["largest_layer_bytes"]
    return [
        Row(
            row="tierd-1 fused: SSD bytes per token against pack - budget + 3 layers",
            ours=fused["ssd_bytes_per_token"],
            theirs=bound,
            unit="bytes",
            at_most=1.0,
            not_applicable=None
            if fused["ssd_bytes_per_token"] is not None
            else "no block device counts the reads",
        )
    ]


def _throughput(result: dict[str, Any], uncapped: str | None) -> list[Row]:
    slow = result["throttled"]
    one, two = slow["rows"]
    fast = [row for row in result["rows"] if row["compute"] == "fused"]
    return [
        Row(
            row=f"two clients against one, SSD throttled to {slow['ssd_bandwidth'] / 1e6:.0f} MB/s",
            ours=two["tokens_per_second"],
            theirs=one["tokens_per_second"],
            unit="tokens/s",
            at_least=1.3,
            not_applicable=uncapped,
        ),
        Row(
            row="two clients against one, SSD not throttled",
            ours=fast[1]["tokens_per_second"],
            theirs=fast[0]["tokens_per_second"],
            unit="tokens/s",
        ),
    ]
