"""A recording as trace events: what Perfetto and chrome://tracing draw.

Format: "Trace Event Format" (Chromium project), JSON object form. Used here: M (names), X (slices:
reads, waits, compute), b and e (how long a layer was resident), i (other decisions), C (counters),
s and f (a flow from a read to the use that it served). Times in microseconds since the first event.

track               one line each
tier dram           decisions; residency of each layer; counters of bytes resident and leased
ssd                 a line per read that runs beside others; a counter of bytes a second
clients             a line per client: waiting for a layer, computing with it

A GPU has the same tracks: `tier gpu:0`, `copies to gpu:0` (each from when the GPU has room for the
layer: it waits for DRAM first) and `clients of gpu:0`. What copies take is a client of DRAM.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierd.core.model import Evict, Grant, LayerKey
from tierd.sim.workload import clients_of
from tierd_tools.recorded_bytes import Reading, bandwidth, occupancy, readings

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from tierd.sim.recording import Recording

    #: by model: its name, the names of its layers
    Names = Mapping[int, tuple[str, Sequence[str]]]

TIER, SSD, CLIENTS = 1, 2, 3  #: process ids of the tracks; those of each further tier follow
DRAWN = ("read", "resident", "grant", "wait")  #: decisions that other events show

TraceEvent = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision of the record: the layer is (model, layer)."""

    at_ns: int
    what: str
    key: tuple[int, int] | None
    text: str


def tracks(
    recording: Recording,
    decided: Iterable[Decided],
    layers: Names,
    clients: Mapping[int, str],
    memory: Mapping[str, int],
    tier: str = "dram",
    number: int = 0,
    zero_ns: int | None = None,
) -> list[TraceEvent]:
    """All trace events, names first, then by time. `memory`: bytes at the end, from which the
    counters are led back. `number` of the tier: its tracks and ids are its own. `zero_ns`: when
    time begins, default with the recording."""
    drawing = _Drawing(recording, layers, tier, number, zero_ns)
    drawing.reads()
    drawing.clients()
    drawing.decisions(decided)
    drawing.residency()
    drawing.counters(memory)
    # The sort is stable: of what happens at one time, a begin stays before its end.
    drawing.events.sort(key=lambda event: float(event["ts"]))
    return [*drawing.names(clients), *drawing.events]


class _Drawing:
    def __init__(
        self, recording: Recording, layers: Names, tier: str, number: int, zero_ns: int | None
    ) -> None:
        self._tier = tier
        self._number = number
        self.events: list[TraceEvent] = []
        self._recording = recording
        self._layers = layers
        self._begin_ns = recording.begin_ns
        self._zero_ns = self._begin_ns if zero_ns is None else zero_ns
        self._readings = readings(recording)
        self._lanes = 0
        self._clients: dict[int, None] = {}

    def _us(self, at_ns: int) -> float:
        return (at_ns - self._zero_ns) / 1000

    def _pid(self, track: int) -> int:
        return track + CLIENTS * self._number

    def _name(self, key: LayerKey) -> str:
        name, layers = self._layers.get(key.model, (f"model {key.model}", ()))
        layer = layers[key.layer] if key.layer < len(layers) else f"layer {key.layer}"
        return f"{name} {layer}"

    def _add(self, ph: str, name: str, at_ns: int, pid: int, tid: int, **more: Any) -> None:
        if "id" in more and self._number:
            more["id"] = f"{self._tier}/{more['id']}"
        pid = self._pid(pid)
        self.events.append(
            {"ph": ph, "name": name, "ts": self._us(at_ns), "pid": pid, "tid": tid, **more}
        )

    def names(self, clients: Mapping[int, str]) -> list[TraceEvent]:
        known = {(TIER, 1): "decisions"}
        reader = "copy" if self._number else "reader"
        known |= {(SSD, lane): f"{reader} {lane}" for lane in range(1, self._lanes + 1)}
        for client in self._clients:
            name = clients.get(client, "")
            known[CLIENTS, client] = f"client {client}" + (f" ({name})" if name else "")
        result = [
            {"ph": "M", "name": "process_name", "pid": self._pid(track), "tid": 0,
                "args": {"name": name}}
            for track, name in (
                (TIER, f"tier {self._tier}"),
                (SSD, f"copies to {self._tier}" if self._number else "ssd"),
                (CLIENTS, f"clients of {self._tier}" if self._number else "clients"),
            )
        ]  # fmt: skip
        for (track, tid), name in known.items():
            where = {"pid": self._pid(track), "tid": tid}
            result.append({"ph": "M", "name": "thread_name", **where, "args": {"name": name}})
        return result

    def reads(self) -> None:
        """A slice for each, on the first line that is free."""
        free: list[int] = []
        busy: list[tuple[int, int]] = []
        for reading in self._readings:
            while busy and busy[0][0] <= reading.begin_ns:
                heapq.heappush(free, heapq.heappop(busy)[1])
            if not free:
                self._lanes += 1
                free.append(self._lanes)
            reading.lane = heapq.heappop(free)
            heapq.heappush(busy, (reading.end_ns, reading.lane))
            read = reading.read
            duration_ns = reading.end_ns - reading.begin_ns
            self._add(
                "X", self._name(read.key), reading.begin_ns, SSD, reading.lane,
                dur=duration_ns / 1000, cat="read",
                args={
                    "reason": read.reason, "bytes": read.nbytes, "slot": read.slot,
                    "result": reading.result,
                    "MB/s": read.nbytes * 1000 // duration_ns if duration_ns else None,
                },
            )  # fmt: skip

    def clients(self) -> None:
        """Waits and compute, one after the other; a flow from the read that a use waited for."""
        served = {(r.read.slot, r.read.generation): r for r in self._readings}
        granted: dict[tuple[int, LayerKey, int], Grant] = {}
        for moment in self._recording.moments:
            for action in moment.actions:
                if isinstance(action, Grant):
                    granted[action.client, action.key, moment.at_ns] = action
        for client in clients_of(self._recording):
            self._clients[client.client] = None
            turn_ns = client.joined_ns
            for use in client.uses:
                turn_ns += use.pause_ns
                name, where = self._name(use.key), (CLIENTS, client.client)
                if use.begin_ns > turn_ns:
                    wait_us = (use.begin_ns - turn_ns) / 1000
                    self._add("X", f"wait for {name}", turn_ns, *where, dur=wait_us, cat="wait")
                ended_ns = use.begin_ns + use.compute_ns
                asked_ms = (use.begin_ns - use.asked_ns) / 1e6
                self._add(
                    "X", name, use.begin_ns, *where, dur=use.compute_ns / 1000, cat="compute",
                    args={"asked_ms_before": asked_ms},
                )  # fmt: skip
                assert use.granted_ns is not None
                grant = granted[client.client, use.key, use.granted_ns]
                reading = served.pop((grant.slot, grant.generation), None)
                if reading is not None and reading.result == "done":
                    self._flow(reading, grant.lease, use.begin_ns, client.client)
                turn_ns = ended_ns

    def _flow(self, reading: Reading, number: int, begin_ns: int, client: int) -> None:
        flow = {"id": number, "cat": "serves"}
        self._add("s", "serves", reading.begin_ns, SSD, reading.lane, **flow)
        self._add("f", "serves", begin_ns, CLIENTS, client, bp="e", **flow)

    def decisions(self, decided: Iterable[Decided]) -> None:
        """An instant for each that nothing else shows, with its reason."""
        for one in decided:
            if one.what not in DRAWN:
                key = None if one.key is None else LayerKey(*one.key)
                name = one.what if key is None else f"{one.what} {self._name(key)}"
                self._add(
                    "i", name, one.at_ns, TIER, 1, s="t", cat=one.what, args={"reason": one.text}
                )

    def residency(self) -> None:
        """From the end of its read to its eviction, or to the end of the record."""
        began: dict[int, Reading] = {}
        for reading in self._readings:
            if reading.result == "done":
                began[reading.read.generation] = reading
        ends = {
            action.generation: moment.at_ns
            for moment in self._recording.moments
            for action in moment.actions
            if isinstance(action, Evict)
        }
        for generation, reading in began.items():
            same = {"id": generation, "cat": "resident"}
            name = self._name(reading.read.key)
            nbytes = {"bytes": reading.read.nbytes, "slot": reading.read.slot}
            self._add("b", name, reading.end_ns, TIER, 1, args=nbytes, **same)
            end_ns = ends.get(generation, self._recording.end_ns)
            self._add("e", name, end_ns, TIER, 1, **same)

    def counters(self, memory: Mapping[str, int]) -> None:
        for name, changes in occupancy(self._recording).items():
            self._counter(TIER, name, changes, memory.get(f"{name}_bytes"))
        self._counter(SSD, "bytes per second", bandwidth(self._recording, self._readings), 0)

    def _counter(
        self, pid: int, name: str, changes: list[tuple[int, int]], end: int | None
    ) -> None:
        """`changes`: (at_ns, by how much). `end`: the value after the last of them."""
        total = sum(change for _, change in changes)
        value = 0 if end is None else max(end - total, 0)
        at: dict[int, int] = {}
        for at_ns, change in [(self._begin_ns, 0), *sorted(changes)]:
            value += change
            at[at_ns] = value
        for at_ns, value in at.items():
            self._add("C", name, at_ns, pid, 0, args={"bytes": max(value, 0)})
