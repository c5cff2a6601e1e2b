"""A value of unknown origin, short and safe enough for an error's text."""

from __future__ import annotations

import reprlib

_REPR = reprlib.Repr()
_REPR.maxstring = 100
_REPR.maxother = 100
_REPR.maxlevel = 3  # deep nesting must not become a RecursionError inside an error


def excerpt(value: object) -> str:
    """Returns the value's repr, cut short; control characters and lone surrogates escaped."""
    return _REPR.repr(value)
