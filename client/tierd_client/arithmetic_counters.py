"""What a model's products are counted as."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ArithmeticCounters:
    """Calls and time of the three ways to use a packed weight: expanded whole (the product that
    follows is excluded), fused, and blocked (the products are included).

    On a GPU the time is the GPU's own, of what it is through with; of fused products some are timed
    and the others taken to be alike. expanded_ahead: expansions that began on a GPU before their
    matrix was asked for; used_ahead: those of them that were then multiplied with.
    """

    expansions: int = 0
    expand_ns: int = 0
    expanded_ahead: int = 0
    used_ahead: int = 0
    fused_calls: int = 0
    fused_ns: int = 0
    blocked_calls: int = 0
    blocked_ns: int = 0
