"""What the record of all decisions says: why a layer is where it is, a day run again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd_tools.quantities import duration, size
from tierd_tools.terminal import say, table

if TYPE_CHECKING:
    from tierd_tools.terminal import Reply


def why(reply: Reply) -> None:
    say(reply["sentence"], soft_wrap=True)
    rows = [
        (f"{duration(told['ago_ns'])} ago", told["what"], told["text"])
        for told in reply.get("history", ())
    ]
    if rows:
        table(("WHEN", "WHAT", "WHY"), rows)
    if "history" in reply:
        record = reply["record"]
        reaches = record["reaches_ns"]
        say(
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
            f"{max(row['hit_ratio'], 0):.1%}",
            size(row["read_bytes"]),
            "-" if row["in_time"] is None else f"{row['in_time']}/{row['uses']}",
            times(row, "stall_ns"),
            times(row, "elapsed_ns"),
        )
        for row in reply["rows"]
    ]
    headings = ("POLICY", "DRAM", "HITS", "READ", "IN TIME", "STALL", "ELAPSED")
    bandwidth = {row["bandwidth"] for row in reply["rows"]}
    say(
        f"{reply['trace']}: {reply['events']} events over {duration(int(reply['seconds'] * 1e9))}, "
        f"at {' and '.join(size(rate) for rate in bandwidth)}/s; memory is empty at the begin"
    )
    table(headings, rows, right=headings[1:])
    for row in reply["rows"]:
        asked, read = row["asked_bytes"], row["read_bytes"]
        if read > asked:
            say(
                f"{row['policy']} at {size(row['budget_bytes'])} read {size(read)} for the "
                f"{size(asked)} that were asked for: some went before they were used"
            )
    for text in dict.fromkeys(text for row in reply["rows"] for text in row["refused"]):
        say(f"left out: {text}", soft_wrap=True)
