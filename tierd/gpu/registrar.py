"""The thread that registers DRAM arenas with the GPUs' driver, and takes that back in time.

One for all GPUs: memory is registered for every context of the process, and a second time is an
error. Copies go on meanwhile; one from a piece that is changing waits for that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from tierd.gpu.errors import DeviceError, DeviceLost
from tierd.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Literal

    from tierd.gpu.device import Device
    from tierd.gpu.ranges import Ranges
    from tierd.gpu.registration import HostMemory, Piece

log = logging.getLogger(__name__)

#: A piece that is not full is registered when nothing was added to it for this long: registering
#: it after each step of population would cost more than it saves.
QUIET_S = 1.0


class Registrar:
    """The thread starts with the first device. Every method but `close` returns at once."""

    def __init__(
        self,
        host: HostMemory,
        call_soon_threadsafe: Callable[..., object],
        *,
        quiet_s: float = QUIET_S,
    ) -> None:
        self.host = host
        self._call_soon = call_soon_threadsafe
        self._quiet_s = quiet_s
        self._devices: list[Device] = []
        self._thread: threading.Thread | None = None
        self._wakes = threading.Condition()
        # Everything below changes under this lock.
        self._discards: deque[tuple[int, int, int, Callable[[DeviceError | None], None]]] = deque()
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
                self._discards.append((arena, start, end, done))
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
        """Unregister what can be in half of that time; the rest ends with the process. No copy may
        be under way. Raises TimeoutError when the driver does not answer."""
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
        while True:
            with self._wakes:
                unsettled = self.host.unsettled(int(self._quiet_s * 1e9))
                if not self._discards and not self._closing and not unsettled:
                    self._wakes.wait(self._quiet_s if self.host.waits() else None)
                discard = self._discards.popleft() if self._discards else None
                closing = self._closing
            if discard is not None:
                self._discard(*discard)
            elif closing:
                break
            elif unsettled:
                self._settle(*unsettled[0])
        self._end()

    def _end(self) -> None:
        for arena, (_, span_bytes) in self.host.arenas().items():
            for start in range(0, span_bytes, self.host.piece_bytes):
                if time.monotonic() > self._ends_at_s:
                    return
                try:
                    self._change(arena, start, start + self.host.piece_bytes, forget=True)
                except DeviceError as error:
                    log.warning("memory stays registered to the end: %s", error)

    def _discard(
        self, arena: int, start: int, end: int, done: Callable[[DeviceError | None], None]
    ) -> None:
        failure = None
        try:
            self._change(arena, start, end, forget=True)
        except DeviceError as error:
            failure = error
        self._call_soon(done, failure)

    def _settle(self, arena: int, offset: int) -> None:
        try:
            self.host.settled(arena, offset)
            self._change(arena, offset, offset + self.host.piece_bytes, forget=False)
        except DeviceError as error:
            with self._wakes:
                if self._failure is None:
                    log.warning("host memory is not registered: %s", error)
                self._failure = str(error)

    def _change(self, arena: int, start: int, end: int, *, forget: bool) -> None:
        """Unregister what [start, end) touches, whose memory is about to go (`forget`), or make
        what is registered in its pieces what exists there."""
        address = self.host.arenas()[arena][0]
        pieces = self.host.claim(arena, start, end)
        try:
            for piece in pieces:
                if forget:
                    self._unregister(
                        piece, address, [old for old in piece.registered if _meet(old, start, end)]
                    )
                else:
                    self._unregister(
                        piece, address, [old for old in piece.registered if old not in piece.exists]
                    )
                    self._register(piece, address)
            if forget:
                self.host.forget(arena, start, end)
        finally:
            self.host.give(pieces)

    def _register(self, piece: Piece, address: int) -> None:
        for start, end in piece.exists:
            if (start, end) not in piece.registered:
                self._try_each("register", address + start, end - start)
                piece.registered = sorted([*piece.registered, (start, end)])

    def _unregister(self, piece: Piece, address: int, stale: Ranges) -> None:
        for start, end in stale:
            try:
                self._try_each("unregister", address + start, end - start)
            except DeviceLost as error:  # no GPU is left that could read it
                log.warning("memory stays locked until the daemon ends: %s", error)
            piece.registered = [kept for kept in piece.registered if kept != (start, end)]

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


def _meet(old: tuple[int, int], start: int, end: int) -> bool:
    return old[0] < end and start < old[1]
