"""How bytes moved in a recording: its reads, their bandwidth, what was resident and leased."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.core.model import (
    ClientGone,
    Evict,
    Grant,
    ModelAdded,
    Read,
    ReadDone,
    ReadFailed,
    Release,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd.sim.recording import Recording

RATE_STEP_NS, RATE_STEPS = 10_000_000, 5_000  #: resolution of the bandwidth: at most so many


@dataclass(slots=True)
class Reading:
    """A read of the recording."""

    read: Read
    begin_ns: int
    end_ns: int
    result: str
    lane: int = 0  #: of a drawing: reads at one time have different ones


def readings(recording: Recording) -> list[Reading]:
    """Every read; one that did not end in the recording ends with it."""
    running: dict[int, Reading] = {}
    found: list[Reading] = []
    for moment in recording.moments:
        event = moment.event
        if isinstance(event, ReadDone | ReadFailed) and event.slot in running:
            reading = running.pop(event.slot)
            reading.end_ns = moment.at_ns
            reading.result = "done" if isinstance(event, ReadDone) else event.code
        for action in moment.actions:
            if isinstance(action, Read):
                reading = Reading(action, moment.at_ns, recording.end_ns, "in flight")
                running[action.slot] = reading
                found.append(reading)
    return found


def bandwidth(recording: Recording, readings: Iterable[Reading]) -> list[tuple[int, int]]:
    """Changes of the bytes a second, in steps. The bytes of a read came between the end of the one
    that ended before it, or its own begin, and its end."""
    begin_ns = recording.begin_ns
    step_ns = max(RATE_STEP_NS, (recording.end_ns - begin_ns) // RATE_STEPS)
    steps: Counter[int] = Counter()
    before_ns = begin_ns
    for reading in sorted(readings, key=lambda reading: reading.end_ns):
        if reading.result != "done":
            continue
        from_ns = max(before_ns, reading.begin_ns)
        before_ns = reading.end_ns
        first, last = (from_ns - begin_ns) // step_ns, (reading.end_ns - begin_ns) // step_ns
        for step in range(first, last + 1):
            low = max(from_ns, begin_ns + step * step_ns)
            high = min(reading.end_ns, begin_ns + (step + 1) * step_ns)
            share = (high - low, reading.end_ns - from_ns) if reading.end_ns > from_ns else (1, 1)
            steps[step] += reading.read.nbytes * share[0] // share[1]
    changes: list[tuple[int, int]] = []
    for step, nbytes in steps.items():
        rate = nbytes * 10**9 // step_ns
        changes += [(begin_ns + step * step_ns, rate), (begin_ns + (step + 1) * step_ns, -rate)]
    return changes


def occupancy(recording: Recording) -> dict[str, list[tuple[int, int]]]:
    """Changes of the bytes resident and leased, (at_ns, by how much)."""
    events = [*recording.opening, *(moment.event for moment in recording.moments)]
    sizes = {event.model: event.layer_bytes for event in events if isinstance(event, ModelAdded)}
    changes: dict[str, list[tuple[int, int]]] = {"resident": [], "leased": []}
    reading: dict[int, int] = {}
    leases: dict[int, tuple[int, int, int]] = {}  # lease: client, slot, bytes
    holders: Counter[int] = Counter()

    def over(lease: int, at_ns: int) -> None:
        _, slot, nbytes = leases.pop(lease)
        holders[slot] -= 1
        if not holders[slot]:
            changes["leased"].append((at_ns, -nbytes))

    for moment in recording.moments:
        at_ns, event = moment.at_ns, moment.event
        match event:
            case ReadDone() if event.slot in reading:
                changes["resident"].append((at_ns, reading.pop(event.slot)))
            case Release() if event.lease in leases:
                over(event.lease, at_ns)
            case ClientGone():
                for lease in [n for n, (c, _, _) in leases.items() if c == event.client]:
                    over(lease, at_ns)
            case _:
                pass
        for action in moment.actions:
            match action:
                case Read():
                    reading[action.slot] = action.nbytes
                case Evict():
                    failed = reading.pop(action.slot, None) is not None
                    if not failed and action.key is not None and action.key.model in sizes:
                        nbytes = sizes[action.key.model][action.key.layer]
                        changes["resident"].append((at_ns, -nbytes))
                case Grant():
                    leases[action.lease] = (action.client, action.slot, action.nbytes)
                    holders[action.slot] += 1
                    if holders[action.slot] == 1:
                        changes["leased"].append((at_ns, action.nbytes))
                case _:
                    pass
    return changes
