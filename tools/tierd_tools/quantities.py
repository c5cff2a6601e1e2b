"""Bytes and times for people: binary units, times in the largest that fits."""

from __future__ import annotations


def size(nbytes: int) -> str:
    """`3.1 GiB`; whole numbers below 1 KiB."""
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{nbytes} B" if unit == "B" else f"{value:,.1f} {unit}"


def duration(ns: int) -> str:
    """`1.5 ms`, `12.0 s`, `3 h 05 min`."""
    for limit, divisor, unit in (
        (10**6, 10**3, "us"),
        (10**9, 10**6, "ms"),
        (60 * 10**9, 10**9, "s"),
    ):
        if ns < limit:
            return f"{ns / divisor:.1f} {unit}"
    minutes = ns // (60 * 10**9)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
