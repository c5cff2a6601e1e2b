"""Passes that a GPU repeats by itself: decoding with a static cache, where all layers are resident.

The first pass of a kind runs as usual; the second is captured, if no memory is pressed for and all
leases are here, and then replayed as long as that stays so. The thread beside the model drops the
graphs when it does not.
"""

from __future__ import annotations

import logging
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierd_client.captured_pass import CapturedPass
from tierd_client.decode_calls import cache_form, decode_call
from tierd_client.errors import LeaseLost, UnsupportedDevice, ViewStillAlive

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from tierd_client.compute import Arithmetic
    from tierd_client.decode_calls import DecodeCall
    from tierd_client.device_leasing import DeviceLeases

#: Each has an input and a result of its own, and a cache.
MOST_GRAPHS = 4
#: Passes that a cache runs as usual while all graphs are taken, before the one that nobody used
#: meanwhile is given up for it: making one costs about two of them.
PATIENCE = 8
MOST_SEEN = 64  # kinds of passes that ran once
NEW = "no pass of this kind was met before"
PRESSED = "memory is short: others may need what a graph would hold"
NOT_HERE = "not all layers are leased and kept"
TAKEN = (
    "all {most} graphs are taken: one that rests for {patience} passes of this cache is given up"
)

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Wait:
    """Of a cache without a graph: passes that it ran as usual since all graphs were last used, and
    when that was, in decoding passes of the model."""

    since: int
    passes: int = 0


class Graphs:
    """Those of one model. Thread-safe. Raises UnsupportedDevice where there are none."""

    def __init__(self, leases: DeviceLeases, arithmetic: Arithmetic) -> None:
        if arithmetic.streams is None:
            raise UnsupportedDevice(
                f"graphs=True on {arithmetic.device} is refused: a GPU repeats passes by itself, "
                'the CPU does not; load with device="cuda", or without graphs'
            )
        self._leases = leases
        self._arithmetic = arithmetic
        self._streams = arithmetic.streams
        self._lock = threading.Lock()
        self._passes: list[CapturedPass] = []  # last used last
        self._seen: set[Hashable] = set()
        self._waits: weakref.WeakKeyDictionary[Any, _Wait] = weakref.WeakKeyDictionary()
        self._calls = 0
        self._closed = False
        #: Why the last pass that decodes was not a replay; "" when it was one.
        self.refusal = ""
        self.captures = self.replays = 0

    @property
    def alive(self) -> int:
        """How many there are now."""
        return len(self._passes)

    def call(
        self, run: Callable[..., Any], arguments: Mapping[str, Any], attention: str = ""
    ) -> Any:
        """The result of `run(**arguments)`, a pass of the model. Raises what that raises, and
        UnsupportedOperation for a decoding pass that no graph can be made of."""
        call = decode_call(arguments, attention)
        if call is None:
            return run(**arguments)
        with self._lock:
            captured = self._ready(call, run)
            if captured is not None:
                return self._replay(captured, call)
        return run(**arguments)

    def tend(self) -> None:
        """Drop all, if memory is short."""
        if self._passes and self._leases.opened.pressed:
            with self._lock:
                self._drop(PRESSED)

    def drop(self) -> None:
        """Give back all leases."""
        with self._lock:
            self._drop("dropped")

    def close(self) -> None:
        """Give back all leases, and capture nothing any more."""
        with self._lock:
            self._closed = True
            self._drop("closed")

    def _ready(self, call: DecodeCall, run: Callable[..., Any]) -> CapturedPass | None:
        """The graph for a call, captured if it is time for it."""
        self._leases.check()
        self._calls += 1
        if self._closed or self._leases.opened.pressed:
            self._drop("closed" if self._closed else PRESSED)
            return None
        for captured in self._passes:
            if captured.takes(call):
                return captured
        kind = call.key, cache_form(call.cache)
        if kind not in self._seen:
            self._seen = {kind, *list(self._seen)[:MOST_SEEN]}
            self.refusal = NEW
            return None
        if not self._place(call):
            self.refusal = TAKEN.format(most=MOST_GRAPHS, patience=PATIENCE)
            return None
        return self._captured(call, run)

    def _place(self, call: DecodeCall) -> bool:
        """Whether a graph may be made for this cache: one more, or in place of one that rests.

        Caches that decode in turn would otherwise take each other's graphs, a new one each pass.
        """
        if len(self._passes) < MOST_GRAPHS:
            return True
        wait = self._waits.get(call.cache)
        if wait is None or self._passes[0].used_at > wait.since:
            wait = self._waits[call.cache] = _Wait(self._calls)
        wait.passes += 1
        return wait.passes > PATIENCE

    def _captured(self, call: DecodeCall, run: Callable[..., Any]) -> CapturedPass | None:
        hold = self._leases.hold()
        if hold is None:
            self.refusal = NOT_HERE
            return None
        try:
            if len(self._passes) >= MOST_GRAPHS:
                self._end(self._passes.pop(0))
            found = CapturedPass(call, run, hold, self._leases, self._arithmetic, self._streams)
        except BaseException:
            with suppress(LeaseLost, ViewStillAlive):
                hold.end()
            raise
        self._passes.append(found)
        self.captures += 1
        return found

    def _replay(self, captured: CapturedPass, call: DecodeCall) -> Any:
        self._passes.remove(captured)
        try:
            self._leases.begin_pass()
            self._arithmetic.begin_pass()
            result = captured.replay(call)
        except BaseException:
            self._end(captured)
            raise
        captured.used_at = self._calls
        self._passes.append(captured)
        self._arithmetic.repeated(captured.work)
        self.replays += 1
        self.refusal = ""
        return result

    def _drop(self, reason: str) -> None:
        if self._passes:
            _log.info("%s: graphs are dropped: %s", self._leases.opened.name, reason)
        self.refusal = reason
        self._seen.clear()
        while self._passes:
            self._end(self._passes.pop())

    def _end(self, captured: CapturedPass) -> None:
        with suppress(LeaseLost, ViewStillAlive):  # said to who replays it; goes back later
            captured.end()
