"""What a client counts about itself."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClientStatistics:
    """Totals since the client was made, and what it holds now."""

    #: Leases granted.
    leases: int
    #: Bytes of the layers granted.
    leased_bytes: int
    #: Leases not ended yet, and their bytes.
    held: int
    held_bytes: int
    #: Requests ahead, and how many of them the daemon answered "later".
    ahead: int
    later: int
    #: Time that callers waited for layers: the stall.
    wait_ns: int


class Counters:
    """The statistics in the making. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._leases = self._leased_bytes = self._held = self._held_bytes = 0
        self._ahead = self._later = self._wait_ns = 0
        # Leases end in finalizers too, which must not wait for a lock that their thread holds.
        self._ended: deque[int] = deque()

    def snapshot(self) -> ClientStatistics:
        """The totals now."""
        with self._lock:
            while self._ended:
                self._held -= 1
                self._held_bytes -= self._ended.popleft()
            return ClientStatistics(
                leases=self._leases,
                leased_bytes=self._leased_bytes,
                held=self._held,
                held_bytes=self._held_bytes,
                ahead=self._ahead,
                later=self._later,
                wait_ns=self._wait_ns,
            )

    def granted(self, nbytes: int) -> None:
        """One more lease."""
        with self._lock:
            self._leases += 1
            self._leased_bytes += nbytes
            self._held += 1
            self._held_bytes += nbytes
            while self._ended:
                self._held -= 1
                self._held_bytes -= self._ended.popleft()

    def ended(self, nbytes: int) -> None:
        """One lease less."""
        self._ended.append(nbytes)

    def asked_ahead(self) -> None:
        """A request ahead was sent."""
        with self._lock:
            self._ahead += 1

    def put_off(self) -> None:
        """The daemon answered a request ahead with "later"."""
        with self._lock:
            self._later += 1

    def stalled(self, ns: int) -> None:
        """Somebody waited."""
        with self._lock:
            self._wait_ns += ns
