"""tierctl: packs, unpacks and evaluates models, and shows what a daemon is doing.

Exit codes: 0 done, 1 failed (one line on stderr says why), 2 wrong usage. `--json` prints the
result as one JSON document, on every command.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from tierd_layouts.errors import FormatError, SocketPathEmpty, SocketPathTooLong
from tierd_tools import daemon_commands, pack_commands, predict_command, record_commands, render
from tierd_tools.doctor import command as doctor_command
from tierd_tools.errors import BadSetting, ToolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

USAGE, FAILURE = 2, 1
_OF_PACKS = (pack_commands, predict_command)
_OF_A_DAEMON = (doctor_command, daemon_commands, record_commands)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="tierctl", description="Pack models; look into a daemon.")
    top.add_argument("--version", action="version", version=f"tierctl {version('tierd')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], Any], about: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        return sub

    for group in (*_OF_PACKS, *_OF_A_DAEMON):
        group.add(command)
    return top


def _failed(result: Any) -> bool:
    """Whether a reload met packs that it could not load, an evict layers that had to stay, or the
    doctor something needed that does not work; everything else raises."""
    if not isinstance(result, dict):
        return False
    lists = (result.get("failed"), result.get("kept"))  # `why` says yes or no under these names
    return any(isinstance(named, list) and named for named in lists)


def _show(arguments: argparse.Namespace, result: Any) -> None:
    if arguments.json:
        plain = result if isinstance(result, dict) else dataclasses.asdict(result)
        print(json.dumps(plain, indent=1, default=str, allow_nan=False))
    elif arguments.command in render.TABLES:
        render.TABLES[arguments.command](result)
    elif arguments.command == "doctor":
        doctor_command.show(result)
    else:
        print(result.summary())


@contextmanager
def _unwound_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as an interrupt does: what it had begun to write is removed."""

    def terminated(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        with _unwound_by_sigterm():
            result = arguments.run(arguments)
        _show(arguments, result)
        sys.stdout.flush()
        return FAILURE if _failed(result) else 0
    except (BadSetting, SocketPathEmpty, SocketPathTooLong) as error:
        print(f"tierctl: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # `tierctl ... | head`: nobody wants the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ToolError, FormatError) as error:
        print(f"tierctl: {error}", file=sys.stderr)
        return FAILURE
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        print(f"tierctl: {where}{error.strerror or error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        resumes = "; a pack run resumes where it stopped" if arguments.command == "pack" else ""
        print(f"tierctl: interrupted{resumes}", file=sys.stderr)
        return FAILURE


if __name__ == "__main__":
    sys.exit(main())
