"""A recorded day: what a machine was told and what it answered, from its record or from a file."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from tierd.core.errors import UnknownRecord
from tierd.core.model import BudgetChanged, CoreConfig, Done, Read, ReadDone, ReadFailed
from tierd.core.transcript import restored
from tierd.sim.errors import BadRecording

if TYPE_CHECKING:
    from pathlib import Path

    from tierd.core.machine import TierMachine
    from tierd.core.model import Action, Event

FORMAT = "tierd-trace"
VERSION = 1
DRAM = "dram"


@dataclass(frozen=True, slots=True)
class Moment:
    """One event and what it led to."""

    at_ns: int
    event: Event
    actions: tuple[Action, ...]


@dataclass(frozen=True, slots=True)
class Recording:
    """`opening`: what was there before the first moment (`tierd.core.story.Story.opening`)."""

    config: CoreConfig
    opening: tuple[Event, ...]
    moments: tuple[Moment, ...]

    @classmethod
    def of(cls, machine: TierMachine) -> Recording:
        """As far back as the machine's record reaches."""
        record = machine.record
        moments = [Moment(entry.at_ns, entry.event, entry.actions) for entry in record.entries()]
        return cls(machine.config, tuple(record.opening()), tuple(moments))

    @classmethod
    def read(cls, path: Path, tier: str = DRAM) -> Recording:
        """The day of one tier, from a file of `tierctl trace`. Raises BadRecording, UnknownRecord,
        OSError."""
        try:
            document = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise BadRecording(f"{path} is no JSON document: {error}") from error
        data = document.get("otherData") if isinstance(document, dict) else None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise BadRecording(f"{path} is not from `tierctl trace`: no otherData of {FORMAT!r}")
        if tier != DRAM:
            gpus = data.get("gpus")
            gpus = gpus if isinstance(gpus, dict) else {}
            data = gpus.get(tier)
            if not isinstance(data, dict):
                known = ", ".join([DRAM, *map(str, gpus)])
                raise BadRecording(f"{path} has no day of {tier!r:.40}; it has those of {known}")
        if data.get("version") != VERSION:
            raise BadRecording(f"{path} has version {data.get('version')!r}, not {VERSION}")
        try:
            return cls.restored(data)
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, UnknownRecord):
                raise
            raise BadRecording(f"{path} is damaged: {type(error).__name__}: {error}") from error

    @classmethod
    def restored(cls, data: dict[str, Any]) -> Recording:
        """From what the daemon tells: `schema`, `config`, `opening`, `entries`."""
        schema = data["schema"]
        known = {field.name for field in fields(CoreConfig)}
        config = {name: value for name, value in data["config"].items() if name in known}
        for name, value in config.items():
            if type(value) is not int or value < (name == "granule_bytes"):
                raise ValueError(f"config: {name} is {value!r:.40}")
        moments = [
            Moment(at_ns, restored(event, schema), tuple(restored(a, schema) for a in actions))
            for _, at_ns, event, actions, *_ in data["entries"]
        ]
        if any(type(moment.at_ns) is not int for moment in moments):
            raise ValueError("a time is no whole number")
        if any(later.at_ns < earlier.at_ns for earlier, later in pairwise(moments)):
            raise ValueError("its time runs backwards")
        opening = tuple(restored(event, schema) for event in data["opening"])
        return cls(CoreConfig(**config), opening, tuple(moments))

    @property
    def begin_ns(self) -> int:
        return self.moments[0].at_ns if self.moments else 0

    @property
    def end_ns(self) -> int:
        return self.moments[-1].at_ns if self.moments else 0

    @property
    def budget_bytes(self) -> int:
        """The budget at the end of the day."""
        last = self.config.budget_bytes
        for event in self.opening:
            if isinstance(event, BudgetChanged):
                last = event.budget_bytes
        for moment in self.moments:
            if isinstance(moment.event, BudgetChanged) and any(
                isinstance(action, Done) for action in moment.actions
            ):
                last = moment.event.budget_bytes
        return last

    def bandwidth(self) -> int | None:
        """Bytes a second of the recorded reads while any was in flight; None if none ended."""
        open_reads: dict[int, Read] = {}
        nbytes = busy_ns = 0
        since_ns = self.begin_ns
        for moment in self.moments:
            if open_reads:
                busy_ns += moment.at_ns - since_ns
            since_ns = moment.at_ns
            if isinstance(moment.event, ReadDone | ReadFailed):
                read = open_reads.pop(moment.event.slot, None)
                nbytes += 0 if read is None else read.nbytes
            for action in moment.actions:
                if isinstance(action, Read):
                    open_reads[action.slot] = action
        return nbytes * 1_000_000_000 // busy_ns if nbytes and busy_ns else None
