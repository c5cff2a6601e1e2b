"""What the core raises. The first two mean a mistake in code, never a state of the world.

CoreError
  IllegalEvent (ValueError)          the caller sent an event that cannot happen in this state
  InvariantBroken (AssertionError)   `check()` found the machine's own books wrong
  UnknownRecord (ValueError)         a recording holds what this version does not know
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd.core.story import Decision


class CoreError(Exception):
    """The base of everything that the core raises."""

    def __init__(self, text: str, story: Sequence[Decision] = ()) -> None:
        #: the last decisions about the thing that the error names, oldest first
        self.story = tuple(story)
        lines = [text, *(f"  {decision}" for decision in self.story[-20:])]
        super().__init__("\n".join(lines))


class IllegalEvent(CoreError, ValueError):
    """An event that cannot happen now. It changed nothing."""


class InvariantBroken(CoreError, AssertionError):
    """The machine contradicts itself."""


class UnknownRecord(CoreError, ValueError):
    """A recording holds an event, an action or a field that this version does not know."""
