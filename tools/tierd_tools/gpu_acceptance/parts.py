"""A part of the acceptance: one process, a budget of time, and how it ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

LAST_LINES = 12


@dataclass(frozen=True, slots=True)
class Outcome:
    """`reason` is empty where the process ended with one of the statuses that were expected."""

    name: str
    seconds: float
    allowed: float
    status: int | None  #: None: it was ended, or never started
    reason: str
    log: str

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "seconds": round(self.seconds, 1), "allowed": round(self.allowed)}


@dataclass(slots=True)
class Running:
    """A part that was started."""

    name: str
    process: subprocess.Popen[bytes]
    begin: float
    allowed: float
    log: Path
    good: Sequence[int]


class Parts:
    """Runs parts one after the other, or one beside others. What a part does not use, later ones
    may."""

    def __init__(self, seconds: float, folder: Path, environ: Mapping[str, str]) -> None:
        """seconds: for all of them together. folder: of the logs."""
        self._folder = folder
        self._environ = dict(environ)
        self._begin = time.monotonic()
        self._granted = 0.0
        self._seconds = seconds
        self.outcomes: list[Outcome] = []

    @property
    def seconds(self) -> float:
        """Since the first part could have started."""
        return time.monotonic() - self._begin

    def skip(self, name: str, seconds: float, reason: str) -> Outcome:
        """A part that is not run, whose time is for later ones."""
        self._granted += seconds
        return self._done(Outcome(name, 0.0, seconds, None, reason, ""))

    def run(
        self,
        name: str,
        seconds: float,
        command: Sequence[str],
        good: Sequence[int] = (0,),
        output: Path | None = None,
        most: float | None = None,
    ) -> Outcome:
        """seconds: its own budget; most: with what others left over. good: the statuses that are no
        failure of the part. output: where its stdout goes, if not into its log."""
        started = self.start(name, seconds, command, good, output, most)
        return started if isinstance(started, Outcome) else self.finish(started)

    def start(
        self,
        name: str,
        seconds: float,
        command: Sequence[str],
        good: Sequence[int] = (0,),
        output: Path | None = None,
        most: float | None = None,
    ) -> Running | Outcome:
        """As `run`, but others may run beside it until `finish`. An Outcome: it was too late."""
        self._granted += seconds
        allowed = min(self._granted, self._seconds) - self.seconds
        allowed = allowed if most is None else min(allowed, most)
        log = self._folder / f"{name}.log"
        if allowed < 1:
            reason = f"the {self._seconds:g} s of the whole run were used up before it"
            return self._done(Outcome(name, 0.0, 0.0, None, reason, ""))
        with log.open("wb") as err, (output or log).open("ab" if output is None else "wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=err, stdin=subprocess.DEVNULL,
                env={**self._environ, "TIERD_PART_SECONDS": f"{allowed:.0f}"},
                start_new_session=True,
            )  # fmt: skip
        return Running(name, process, time.monotonic(), allowed, log, good)

    def finish(self, running: Running) -> Outcome:
        """Wait for it, until its time is over."""
        left = running.begin + running.allowed - time.monotonic()
        try:
            status: int | None = running.process.wait(max(left, 0.1))
        except subprocess.TimeoutExpired:
            status = None
        _end(running.process)
        spent = time.monotonic() - running.begin
        reason = ""
        if status is None:
            reason = f"it did not end within {running.allowed:.0f} s"
        elif status not in running.good:
            reason = f"it ended with {status}: {_last(running.log)}"
        name, allowed = running.name, running.allowed
        return self._done(Outcome(name, spent, allowed, status, reason, str(running.log)))

    def _done(self, outcome: Outcome) -> Outcome:
        self.outcomes.append(outcome)
        said = outcome.reason or "done"
        print(f"[{self.seconds:5.0f} s] {outcome.name}: {said.splitlines()[0]}", flush=True)
        return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started in its session: a daemon, models."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(lines[-LAST_LINES:]) or "it said nothing"
