"""What copies to one GPU get: measured from real ones, as a device's curve is (`cost`).

There is no curve: a copy is large, and its latency is a small part of it.
"""

from __future__ import annotations

from math import exp, log

from tierd.core.cost import SECOND_NS

_CORRECTION = 1 / 8  #: how much one observation of many counts


class CopyRate:
    """Follows what was observed; the first observations count more than later ones."""

    def __init__(self) -> None:
        self.observations = 0
        self._log = 0.0

    @property
    def bytes_per_s(self) -> int | None:
        """None until something was observed."""
        return max(int(exp(self._log)), 1) if self.observations else None

    def observe(self, nbytes: int, busy_ns: int) -> int:
        """So many bytes were copied in the time in which blocks were under way; waiting for blocks
        that are still read is none of it. Returns the rate from now on. Raises ValueError for what
        is no copy."""
        if min(nbytes, busy_ns) < 1:
            raise ValueError(f"{nbytes} bytes in {busy_ns} ns are no copy")
        rate = log(nbytes * SECOND_NS / busy_ns)
        step = max(_CORRECTION, 1 / (self.observations + 1))
        self._log += (rate - self._log) * step
        self.observations += 1
        return max(int(exp(self._log)), 1)
