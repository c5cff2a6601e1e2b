"""What several commands of tierctl have in common: the socket, the model, progress on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tierd_layouts.errors import NameRefused
from tierd_layouts.names import check_model_name
from tierd_tools.errors import BadSetting

if TYPE_CHECKING:
    from tierd_tools.progress import Progress

Command = Callable[[str, Callable[[argparse.Namespace], Any], str], argparse.ArgumentParser]
"""Makes a command: its name, what it runs, a sentence about it."""


def add_socket(command: argparse.ArgumentParser) -> None:
    command.add_argument("--socket", help="default: $TIERD_SOCKET, then the usual places")


def asked_model(arguments: argparse.Namespace) -> str:
    """The name of a model that is served. Raises BadSetting for what can be no name."""
    try:
        return check_model_name(arguments.model)
    except NameRefused as error:
        raise BadSetting(str(error)) from error


def progress(arguments: argparse.Namespace) -> Progress:
    """On stderr; none beside --json."""
    from tierd_tools.progress import SilentProgress, for_stream

    return SilentProgress() if arguments.json else for_stream(sys.stderr)
