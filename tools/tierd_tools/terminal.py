"""Lines and tables on standard output, of whatever others call themselves."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Sequence

Reply = dict[str, Any]
"""What a command has to show: of a daemon's answer, or as `--json` prints it."""
LOG_WIDTH = 120


def printable(text: str) -> str:
    """Names come from clients and directories: nothing in them may command a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def say(line: str, *, soft_wrap: bool = False) -> None:
    _console().print(printable(line), soft_wrap=soft_wrap)


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()
) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", show_header=any(headings))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    _console().print(table)


def _console() -> Console:
    return Console(
        file=sys.stdout, width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False,
        markup=False, emoji=False,
    )  # fmt: skip
