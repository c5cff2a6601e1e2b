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


class Parts:
    """Runs parts one after the other. What a part does not use, later ones may."""

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
    ) -> Outcome:
        """seconds: its own budget. good: the statuses that are no failure of the part. output:
        where its stdout goes, if not into its log."""
        self._granted += seconds
        allowed = min(self._granted, self._seconds) - self.seconds
        log = self._folder / f"{name}.log"
        if allowed < 1:
            reason = f"the {self._seconds:g} s of the whole run were used up before it"
            return self._done(Outcome(name, 0.0, 0.0, None, reason, ""))
        begin = time.monotonic()
        with log.open("wb") as err, (output or log).open("ab" if output is None else "wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=err, stdin=subprocess.DEVNULL,
                env=self._environ, start_new_session=True,
            )  # fmt: skip
            try:
                status: int | None = process.wait(allowed)
            except subprocess.TimeoutExpired:
                status = None
            _end(process)
        spent = time.monotonic() - begin
        reason = ""
        if status is None:
            reason = f"it did not end within {allowed:.0f} s"
        elif status not in good:
            reason = f"it ended with {status}: {_last(log)}"
        return self._done(Outcome(name, spent, allowed, status, reason, str(log)))

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
