"""Byte counts as people write them: "4GiB", "1.5GB", 4294967296."""

from __future__ import annotations

import re
from decimal import Decimal

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)}

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", re.ASCII)

LARGEST = (1 << 63) - 1  #: what an off_t holds


def parse_size(text: str | int) -> int:
    """The bytes that `text` means, fractions of a byte dropped. ValueError quotes `text`."""
    if isinstance(text, bool):
        raise ValueError(f"{text!r} is not a size: expected a form like '4GiB', '1.5GB' or 1048576")
    if isinstance(text, int):
        size = text
    else:
        match = _SIZE.fullmatch(text.strip())
        if match is None:
            raise ValueError(
                f"{text!r} is not a size: expected a form like '4GiB', '1.5GB' or '1048576'"
            )
        number, unit = match[1], match[2].lower()
        if unit not in _UNITS:
            raise ValueError(
                f"{text!r} has no unit that is known ({match[2]!r}): "
                "write KiB, MiB, GiB, TiB (powers of 1024) or kB, MB, GB, TB (powers of 1000)"
            )
        size = int(Decimal(number) * _UNITS[unit])
    if not 0 < size <= LARGEST:
        raise ValueError(f"{text!r} is {size} bytes: a size is between 1 and {LARGEST} bytes")
    return size


def format_size(nbytes: int) -> str:
    """`nbytes` for a text that people read, e.g. "4.0 GiB"; exact below 1 KiB."""
    if abs(nbytes) < 1024:
        return f"{nbytes} bytes"
    value = float(nbytes)
    for unit in ("KiB", "MiB", "GiB"):
        value /= 1024
        if abs(value) < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TiB"
