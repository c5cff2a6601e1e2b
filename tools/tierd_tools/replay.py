"""`tierctl replay`: a recorded day against other budgets, bandwidths and policies, in a table."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from tierd.core.errors import IllegalEvent, UnknownRecord
from tierd.sim.errors import BadRecording
from tierd.sim.recording import DRAM, Recording
from tierd.sim.replay import POLICIES, replay
from tierd.sizes import parse_size
from tierd_tools.errors import BadSetting, TraceRefused

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def run(
    path: Path,
    policies: Sequence[str] = (),
    dram: Sequence[str] = (),
    ssd_bandwidth: str | None = None,
    tier: str = DRAM,
) -> dict[str, Any]:
    """Rows for every policy (all, if none is named) under every budget (the recorded one). On a GPU
    what is read are copies, and the bandwidth is theirs."""
    budgets: list[int | None] = [_size("--dram", text) for text in dram]
    bandwidth = (
        None
        if ssd_bandwidth is None
        else _size("--ssd-bandwidth", ssd_bandwidth.removesuffix("/s"))
    )
    try:
        recording = Recording.read(path, tier)
        rows = [
            row
            for budget in dict.fromkeys(budgets) or [None]
            for row in replay(
                recording,
                tuple(dict.fromkeys(policies)) or POLICIES,
                budget_bytes=budget,
                bandwidth=bandwidth,
            )
        ]
    except (BadRecording, UnknownRecord) as error:
        raise TraceRefused(str(error)) from error
    except IllegalEvent as error:
        text = str(error).partition("\n")[0]
        raise TraceRefused(f"{path} is no day of a daemon: {text}") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # Its values are of the wrong kind or out of range: the replay is where that is found.
        text = f"{type(error).__name__}: {error}"
        raise TraceRefused(f"{path} is damaged, it cannot be replayed: {text}") from error
    return {
        "trace": str(path),
        "tier": tier,
        "seconds": (recording.end_ns - recording.begin_ns) / 1e9,
        "events": len(recording.moments),
        "recorded_budget_bytes": recording.budget_bytes,
        "recorded_bandwidth": recording.bandwidth(),
        "rows": [{**dataclasses.asdict(row), "hit_ratio": row.hit_ratio} for row in rows],
    }


def _size(option: str, text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise BadSetting(f"{option}: {error}") from error
