"""A token bucket: how long a read has to wait so that the device stays below a given rate."""

from __future__ import annotations

import threading
import time

_SECOND_NS = 1_000_000_000


class TokenBucket:
    """At most `rate * t + burst` bytes in any window of t seconds. Pure: time is an argument.

    A take may overdraw; the one who overdrew waits until the level is back at zero, those after it
    wait longer. So a block larger than the burst passes too, and order of takes is order of reads.
    The level is kept in byte-nanoseconds per second, an exact integer: nothing drifts.
    """

    def __init__(self, rate_bytes_per_s: int, burst_bytes: int, *, at_ns: int) -> None:
        if rate_bytes_per_s <= 0 or burst_bytes < 0:
            raise ValueError(
                f"rate above 0 and burst not below 0, not {rate_bytes_per_s} and {burst_bytes}"
            )
        self.rate_bytes_per_s = rate_bytes_per_s
        self._full = burst_bytes * _SECOND_NS
        self._level = self._full
        self._at_ns = at_ns

    def take(self, nbytes: int, *, at_ns: int) -> int:
        """Take `nbytes`; returns the nanoseconds to wait before using them."""
        elapsed_ns = at_ns - self._at_ns
        self._at_ns = at_ns
        self._level = min(self._full, self._level + elapsed_ns * self.rate_bytes_per_s)
        self._level -= nbytes * _SECOND_NS
        if self._level >= 0:
            return 0
        return -(self._level // self.rate_bytes_per_s)


class Throttle:
    """A bucket that all reader threads share."""

    def __init__(self, rate_bytes_per_s: int, burst_bytes: int) -> None:
        self._bucket = TokenBucket(rate_bytes_per_s, burst_bytes, at_ns=time.monotonic_ns())
        self._lock = threading.Lock()
        self.rate_bytes_per_s = rate_bytes_per_s
        self.waited_ns = 0  #: by all threads together, also what they still have to wait

    def wait(self, nbytes: int, closing: threading.Event) -> bool:
        """Wait until `nbytes` may be read; False when `closing` was set first."""
        with self._lock:
            wait_ns = self._bucket.take(nbytes, at_ns=time.monotonic_ns())
            self.waited_ns += wait_ns
        return not closing.wait(wait_ns / 1e9) if wait_ns else True
