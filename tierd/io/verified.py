"""What of a layer is verified while it is read: told to whoever follows, in the reader's threads.

A copy to a GPU follows the read of its source, and moves each block as soon as its hash was found
right; no event loop lies between. Without a follower a block costs one entry of a list.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from tierd.errors import ReadError


class Follower(Protocol):
    """Called in a reader's thread, or in the one that begins to follow, with the lock of what is
    followed held: what it does is quick, and asks nothing of that."""

    def verified(self, start: int, nbytes: int) -> None:
        """[start, start + nbytes) of the layer is in its place, and right."""

    def read_ended(self, failure: ReadError | None) -> None:
        """After everything else: nothing writes into the target any more. With a failure, what
        was told to be verified still is, but the layer is void."""


class VerifiedBlocks:
    """Of one read. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[tuple[int, int]] = []
        self._followers: list[Follower] = []
        self._ended = False
        self._failure: ReadError | None = None

    def follow(self, follower: Follower) -> None:
        """Tell it everything, beginning with what was verified before."""
        with self._lock:
            for start, nbytes in self._blocks:
                follower.verified(start, nbytes)
            if self._ended:
                follower.read_ended(self._failure)
            else:
                self._followers.append(follower)

    def announce(self, start: int, nbytes: int) -> None:
        """The reader: this block was verified."""
        with self._lock:
            self._blocks.append((start, nbytes))
            for follower in self._followers:
                follower.verified(start, nbytes)

    def end(self, failure: ReadError | None) -> None:
        """The reader: that was all. Called once, when the read's own outcome is on its way."""
        with self._lock:
            self._ended, self._failure = True, failure
            for follower in self._followers:
                follower.read_ended(failure)
            self._followers.clear()
