"""The thread that registers DRAM arenas with the GPUs' driver, and takes that back in time.

One for all GPUs: memory is registered for every context of the process, and a second time is an
error. Copies go on meanwhile; one from memory that is being changed waits for that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.gpu.errors import DeviceError, DeviceLost
from tierd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from tierd.gpu.device import Device
    from tierd.gpu.registration import HostMemory

log = logging.getLogger(__name__)

#: A block that is not full is registered when nothing was added to it for this long, while memory
#: is populated: each step alone would make many small registrations.
QUIET_S = 1.0
#: So many registrations more than ranges are made one again.
MOST_FRAGMENTS = 8
#: A copy that takes longer than this is on a GPU that hangs: what waits for its source waits on,
#: and lets others pass.
PATIENCE_S = 10.0
RETRY_S = 1.0
#: Registering does not wait for such a copy, it is tried again after this.
PUT_OFF_S = 30.0


@dataclass(frozen=True, slots=True)
class _Discard:
    arena: int
    start: int
    end: int
    done: Callable[[DeviceError | None], None]


class Registrar:
    """The thread starts with the first device. Every method but `close` returns at once."""

    def __init__(
        self,
        host: HostMemory,
        call_soon_threadsafe: Callable[..., object],
        *,
        quiet_s: float = QUIET_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.host = host
        self._call_soon = call_soon_threadsafe
        self._quiet_s = quiet_s
        self._patience_s = patience_s
        self._devices: list[Device] = []
        self._thread: threading.Thread | None = None
        self._wakes = threading.Condition()
        # Everything below changes under this lock.
        self._discards: deque[_Discard] = deque()
        self._closing = False
        self._ends_at_s = 0.0
        self._failure: str | None = None

    def add_device(self, device: Device) -> None:
        """A GPU that is open: it can register memory. It is closed after this registrar."""
        with self._wakes:
            self._devices.append(device)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tierd-pinning", daemon=True)
                self._thread.start()

    def add_arena(self, arena: int, address: int, span_bytes: int) -> None:
        self.host.add_arena(arena, address, span_bytes)

    def populated(self, arena: int, start: int, end: int) -> None:
        """Memory exists there from now on: it is registered in the background."""
        if self.host.populated(arena, start, end):
            with self._wakes:
                self._wakes.notify()

    def discard(
        self, arena: int, start: int, end: int, done: Callable[[DeviceError | None], None]
    ) -> None:
        """Before memory is given back to the system: `done(None)` is called on the loop when no
        GPU can read it any more. With an error it must not be given back: its old pages would be
        read as if they were what comes there next."""
        with self._wakes:
            if self._thread is not None and not self._closing:
                self._discards.append(_Discard(arena, start, end, done))
                self._wakes.notify()
                return
        self.host.forget(arena, start, end)  # nothing was ever registered, or nothing is any more
        self._call_soon(done, None)

    def alive(self) -> bool:
        return self._thread is None or self._thread.is_alive()

    def notes(self) -> list[str]:
        """What an operator should know."""
        with self._wakes:
            if self._failure is None:
                return []
            return [
                f"{format_size(self.host.registered_bytes)} of "
                f"{format_size(self.host.existing_bytes)} are registered with the GPUs' driver, "
                f"copies from the rest are slower: {self._failure}"
            ]

    def close(self, timeout_s: float = 10.0) -> None:
        """Unregister what can be in half of that time; the rest ends with the process. Discards
        that wait for a GPU that hangs are not answered. Raises TimeoutError when the driver does
        not answer."""
        with self._wakes:
            self._closing = True
            self._ends_at_s = time.monotonic() + timeout_s / 2
            self._wakes.notify()
            thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
            if thread.is_alive():
                raise TimeoutError(f"{thread.name} did not end in {timeout_s} s")

    # -------------------------------------------------------------------------------------- thread

    def _run(self) -> None:
        late: list[_Discard] = []
        put_off: deque[tuple[float, int, int]] = deque()  # until when, arena, offset of a block
        while True:
            while put_off and put_off[0][0] <= time.monotonic():
                self.host.unsettle(*put_off.popleft()[1:])
            with self._wakes:
                unsettled = self.host.unsettled(int(self._quiet_s * 1e9))
                if not (self._discards or self._closing or unsettled):
                    waits = self._quiet_s if self.host.waits() else None
                    self._wakes.wait(RETRY_S if late or put_off else waits)
                discard = self._discards.popleft() if self._discards else None
                closing = self._closing
            if discard is not None:
                if not self._discard(discard, self._patience_s):
                    late.append(discard)
            elif closing:
                break
            elif unsettled and not self._settle(*unsettled[0]):
                put_off.append((time.monotonic() + PUT_OFF_S, *unsettled[0]))
            late = [old for old in late if not self._discard(old, 0)]
        self._end()

    def _end(self) -> None:
        for arena, (_, span_bytes) in self.host.arenas().items():
            for start, end in self.host.registrations(arena, 0, span_bytes):
                left_s = self._ends_at_s - time.monotonic()
                if left_s > 0:
                    try:
                        self._unregister(arena, start, end, left_s)
                    except DeviceError as error:
                        log.warning("memory stays registered to the end: %s", error)

    def _discard(self, discard: _Discard, patience_s: float) -> bool:
        """Whether it was answered. False when a copy under way forbids that."""
        failure = None
        arena, start, end = discard.arena, discard.start, discard.end
        try:
            for first, last in self.host.registrations(arena, start, end):
                if not self._unregister(arena, first, last, patience_s):
                    return False
            self.host.forget(arena, start, end)
        except DeviceError as error:
            failure = error
        self._call_soon(discard.done, failure)
        return True

    def _settle(self, arena: int, offset: int) -> bool:
        """Register what exists in a block. False when a copy under way forbids that."""
        self.host.settled(arena, offset)
        end = offset + self.host.block_bytes
        try:
            if self.host.fragments(arena, offset) > MOST_FRAGMENTS:
                for first, last in self.host.registrations(arena, offset, end):
                    if not self._unregister(arena, first, last, self._patience_s):
                        return False
            for first, last in self.host.missing(arena, offset):
                if not self._register(arena, first, last, self._patience_s):
                    return False
        except DeviceError as error:
            with self._wakes:
                if self._failure is None:
                    log.warning("host memory is not registered: %s", error)
                self._failure = str(error)
        return True

    def _register(self, arena: int, start: int, end: int, patience_s: float) -> bool:
        address = self.host.arenas()[arena][0]
        if not self.host.claim(arena, start, end, patience_s):
            return False
        try:
            self._try_each("register", address + start, end - start)
            self.host.registered(arena, start, end)
        finally:
            self.host.give()
        return True

    def _unregister(self, arena: int, start: int, end: int, patience_s: float) -> bool:
        address = self.host.arenas()[arena][0]
        if not self.host.claim(arena, start, end, patience_s):
            return False
        try:
            try:
                self._try_each("unregister", address + start, end - start)
            except DeviceLost as error:  # no GPU is left that could read it
                log.warning("memory stays locked until the daemon ends: %s", error)
            self.host.unregistered(arena, start, end)
        finally:
            self.host.give()
        return True

    def _try_each(self, what: Literal["register", "unregister"], address: int, nbytes: int) -> None:
        """Any GPU's context will do. Raises the last refusal, one that is no DeviceLost first."""
        refusal: DeviceError | None = None
        for device in self._devices:
            try:
                if what == "register":
                    return device.register(address, nbytes)
                return device.unregister(address, nbytes)
            except DeviceError as error:
                if refusal is None or isinstance(refusal, DeviceLost):
                    refusal = error
        assert refusal is not None, "a registrar without a device"
        raise refusal
