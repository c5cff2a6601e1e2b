"""Sorted ranges [start, end) that do not touch, as plain lists."""

from __future__ import annotations

Ranges = list[tuple[int, int]]


def added(ranges: Ranges, start: int, end: int) -> Ranges:
    """With [start, end); ranges that touch become one."""
    left = [old for old in ranges if old[1] < start]
    right = [old for old in ranges if old[0] > end]
    for old in ranges[len(left) : len(ranges) - len(right)]:
        start, end = min(start, old[0]), max(end, old[1])
    return [*left, (start, end), *right]


def removed(ranges: Ranges, start: int, end: int) -> Ranges:
    """Without [start, end)."""
    parts = ((old[0], min(old[1], start)) for old in ranges)
    left = [part for part in parts if part[0] < part[1]]
    parts = ((max(old[0], end), old[1]) for old in ranges)
    return left + [part for part in parts if part[0] < part[1]]


def total(ranges: Ranges) -> int:
    return sum(end - start for start, end in ranges)
