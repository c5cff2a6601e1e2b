"""What a simulation raises.

BrokenPromise (AssertionError)   the machine did, or failed to do, what it promises
DoesNotFit (ValueError)          the node that is asked about cannot serve the model
BadRecording (ValueError)        a file is not a recorded day, or cannot be replayed as asked
"""

from __future__ import annotations


class BrokenPromise(AssertionError):
    """The machine broke a promise; the text says which, and how to see it again."""


class DoesNotFit(ValueError):
    """A node cannot serve a model; the text is the core's refusal."""


class BadRecording(ValueError):
    """A file is not what `tierctl trace` writes, or what is asked of it cannot be done."""
