"""The daemon's record as a file: a trace for Perfetto or chrome://tracing, and for `replay`.

`traceEvents` is what a viewer draws (`trace_tracks`); `otherData` is the record itself, all that a
replay needs: configuration, models, clients, plans, and every event with what it led to.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]

from tierd.sim.recording import FORMAT, VERSION, Recording
from tierd_tools.diagnostics import asking
from tierd_tools.quantities import duration
from tierd_tools.trace_tracks import Decided, tracks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import TextIO

    Ask = Callable[..., dict[str, Any]]

POLL_SECONDS = 0.2
PAGE_FIELDS = ("items", "next", "first", "end", "first_ns", "now_ns", "forgotten_decisions")


@dataclass(frozen=True, slots=True)
class Written:
    """What a trace file holds. `missed`: events that the ring forgot before they were fetched."""

    path: str
    entries: int
    trace_events: int
    covers_ns: int
    forgotten: int  #: events before the first
    missed: int

    def summary(self) -> str:
        lost = f", {self.missed} events missed in between" if self.missed else ""
        return (
            f"{self.path}: {self.entries} events over {duration(self.covers_ns)} ({self.forgotten} "
            f"older ones are forgotten{lost}); open it in https://ui.perfetto.dev or replay it"
        )


@dataclass(slots=True)
class Fetched:
    """The pages of one trace."""

    about: dict[str, Any]
    models: list[Any]
    opening: list[Any]
    entries: list[Any] = field(default_factory=list)
    gaps: list[list[int]] = field(default_factory=list)  #: [first missing, next]
    memory: dict[str, int] = field(default_factory=dict)  #: at the end
    forgotten: int = 0
    gpus: dict[str, Fetched] = field(default_factory=dict)  #: by tier: what its own record holds


def trace(socket_path: str | None, path: Path, seconds: float = 0.0) -> Written:
    """Writes what the record holds, and what happens in the next `seconds`."""
    with asking(socket_path) as ask, _output(path) as file:
        fetched = fetch(ask, seconds)
        for tier in fetched.about["tiers"][1:]:
            fetched.gpus[tier] = fetch(ask, 0.0, tier=tier)
        fetched.about["status"] = ask("status")
        document = compose(fetched)
        json.dump(document, file, separators=(",", ":"), allow_nan=False)
    times = [entry[1] for entry in fetched.entries] or [0]
    return Written(
        str(path),
        sum(len(one.entries) for one in (fetched, *fetched.gpus.values())),
        len(document["traceEvents"]),
        times[-1] - times[0],
        fetched.forgotten,
        sum(end - begin for begin, end in fetched.gaps),
    )


@contextmanager
def _output(path: Path) -> Iterator[TextIO]:
    """The file to write, which appears as a whole or not at all. Opened before the day is recorded:
    a path that cannot be written fails at once."""
    if path.exists() and not path.is_file():  # /dev/null, a pipe: to be written, never replaced
        with path.open("w", encoding="utf-8") as file:
            yield file
        return
    target = path.resolve()  # a link stays one
    scratch = target.with_name(f"{target.name}.partial")
    try:
        try:
            file = scratch.open("w", encoding="utf-8")
        except OSError as error:
            error.filename = str(path)  # what was asked for
            raise
        with file:
            yield file
        os.replace(scratch, target)
    finally:
        scratch.unlink(missing_ok=True)


def fetch(
    ask: Ask, seconds: float, poll_seconds: float = POLL_SECONDS, tier: str = "dram"
) -> Fetched:
    """All pages of a tier, and more of them until `seconds` are over."""
    deadline = time.monotonic() + seconds
    first = ask("trace", part="opening", tier=tier)
    about = {key: value for key, value in first.items() if key not in PAGE_FIELDS}
    opening = _rest(ask, "opening", first, tier)
    found = Fetched(about, [], opening, forgotten=first["first"])
    wanted = first["first"]
    while True:
        reply = ask("trace", part="entries", first=wanted, tier=tier)
        entries = [msgpack.unpackb(item) for item in reply["items"]]
        if entries and entries[0][0] > wanted:
            found.gaps.append([wanted, entries[0][0]])
        found.entries += entries
        wanted = max(reply["next"], wanted)
        found.memory = reply.get("memory", found.memory)
        if wanted >= reply["end"]:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(left, poll_seconds))
    # Last: a model that came meanwhile has its names here too.
    found.models = _rest(ask, "models", ask("trace", part="models", tier=tier), tier)
    return found


def _rest(ask: Ask, part: str, reply: dict[str, Any], tier: str) -> list[Any]:
    items: list[Any] = []
    while reply["items"]:
        items += [msgpack.unpackb(item) for item in reply["items"]]
        reply = ask("trace", part=part, first=reply["next"], tier=tier)
    return items


def compose(fetched: Fetched) -> dict[str, Any]:
    """The document."""
    data = _data(fetched)
    data["gpus"] = {tier: _data(one) for tier, one in fetched.gpus.items()}
    begins = [one.entries[0][1] for one in (fetched, *fetched.gpus.values()) if one.entries]
    zero_ns = min(begins, default=0)
    events = _drawn(fetched, data, "dram", 0, zero_ns)
    for number, (tier, one) in enumerate(fetched.gpus.items(), start=1):
        if one.entries:
            events += _drawn(one, data["gpus"][tier], tier, number, zero_ns)
    events.sort(key=lambda event: float(event.get("ts", -1)))  # names first
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": data}


def _data(fetched: Fetched) -> dict[str, Any]:
    """What a replay needs of one tier."""
    return {
        "format": FORMAT,
        "version": VERSION,
        **{("tierd_version" if key == "version" else key): v for key, v in fetched.about.items()},
        "models": fetched.models,
        "opening": fetched.opening,
        "memory": fetched.memory,
        "forgotten_events": fetched.forgotten,
        "gaps": fetched.gaps,
        "entries": [entry[:4] for entry in fetched.entries],
    }


def _drawn(
    fetched: Fetched, data: dict[str, Any], tier: str, number: int, zero_ns: int
) -> list[dict[str, Any]]:
    """What a viewer draws of one tier."""
    decided = [
        Decided(at_ns, what, None if key is None else (key[0], key[1]), text)
        for _, at_ns, _, _, decisions in fetched.entries
        for what, key, text in decisions
    ]
    layers = {model: (name, names) for model, name, names in fetched.models}
    clients = {client["client"]: client["name"] for client in fetched.about["clients"]}
    recording = Recording.restored(data)
    return tracks(
        recording, decided, layers, clients, fetched.memory, tier, number,
        zero_ns if recording.moments else None,
    )  # fmt: skip
