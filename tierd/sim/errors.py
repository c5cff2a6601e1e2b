"""What a simulation raises.

BrokenPromise (AssertionError)   the machine did, or failed to do, what it promises
"""

from __future__ import annotations


class BrokenPromise(AssertionError):
    """The machine broke a promise; the text says which, and how to see it again."""
