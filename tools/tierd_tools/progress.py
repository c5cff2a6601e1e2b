"""How far a long job is: a bar on a terminal, lines in a log, or nothing.

A job has stages (`packing`, `verifying`); a stage has a size in bytes and is told what was done.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from rich.console import Console


class Stage(Protocol):
    """One stage of a job; `advance` is called by one thread only."""

    def advance(self, nbytes: int) -> None:
        """`nbytes` more bytes are done."""


class Progress(Protocol):
    """What a job reports to."""

    def stage(self, title: str, total_bytes: int) -> AbstractContextManager[Stage]:
        """A stage of `total_bytes`; leaving the context ends it, finished or not."""

    def note(self, text: str) -> None:
        """Something that the user should know now."""


def for_stream(stream: IO[str]) -> Progress:
    """A bar when `stream` is a terminal, lines otherwise."""
    if not stream.isatty():
        return LineProgress(stream)
    from rich.console import Console

    return BarProgress(Console(file=stream))


class SilentProgress:
    """Reports nothing."""

    @contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Stage]:
        yield _Counter(lambda done: None)

    def note(self, text: str) -> None:
        pass


class LineProgress:
    """A line at the start of a stage, every `every_s` seconds, and at its end."""

    def __init__(self, stream: IO[str], every_s: float = 5.0) -> None:
        self._stream = stream
        self._every_s = every_s

    @contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Stage]:
        started = said = time.monotonic()

        def show(done: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said < self._every_s:
                return
            said = now
            self.note(f"{title}: {_done(done, total_bytes)}, {_rate(done, now - started)}")

        counter = _Counter(show)
        self.note(f"{title}: {_mib(total_bytes)}")
        yield counter
        seconds = time.monotonic() - started
        share = _done(counter.done, total_bytes)
        self.note(f"{title}: {share} in {seconds:.1f} s, {_rate(counter.done, seconds)}")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class BarProgress:
    """A bar with bytes, speed and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, title: str, total_bytes: int) -> Iterator[Stage]:
        from rich import progress as columns

        with columns.Progress(
            columns.TextColumn("{task.description}"),
            columns.BarColumn(),
            columns.DownloadColumn(binary_units=True),
            columns.TransferSpeedColumn(),
            columns.TimeRemainingColumn(),
            console=self._console,
        ) as bar:
            task = bar.add_task(title, total=total_bytes)
            yield _Counter(lambda done: bar.update(task, completed=done))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


class _Counter:
    """A stage that adds up and shows the sum."""

    def __init__(self, show: Callable[[int], None]) -> None:
        self.done = 0
        self._show = show

    def advance(self, nbytes: int) -> None:
        self.done += nbytes
        self._show(self.done)


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):,.1f} MiB"


def _done(done: int, total_bytes: int) -> str:
    share = 100 * done / total_bytes if total_bytes else 100.0
    return f"{_mib(done)} of {_mib(total_bytes)} ({share:.0f} %)"


def _rate(done: int, seconds: float) -> str:
    return f"{done / max(seconds, 1e-9) / 1e6:,.0f} MB/s"
