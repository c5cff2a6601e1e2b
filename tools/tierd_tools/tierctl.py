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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierd.sizes import parse_size
from tierd_layouts.errors import FormatError, SocketPathTooLong
from tierd_layouts.names import check_model_name
from tierd_tools import pack_settings, predict_command, render
from tierd_tools.diagnostics import ask
from tierd_tools.doctor import command as doctor_command
from tierd_tools.errors import BadSetting, ToolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tierd_tools.progress import Progress

USAGE, FAILURE = 2, 1
_OF_A_MODEL = ("layers", "pin", "unpin", "evict")


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

    pack = command("pack", _pack, "Turn a Hugging Face model folder into a pack.")
    pack.add_argument("model_dir", type=Path)
    pack.add_argument("pack_dir", type=Path)
    _add_pack_settings(pack)
    verify = command("verify", _verify, "Read a whole pack and check every block and tile.")
    verify.add_argument("pack_dir", type=Path)
    unpack = command("unpack", _unpack, "Turn a pack back into an ordinary checkpoint.")
    unpack.add_argument("pack_dir", type=Path)
    unpack.add_argument("out_dir", type=Path)
    unpack.add_argument(
        "--format",
        choices=("checkpoint", "sparse-bitmask"),
        default="checkpoint",
        help="an ordinary checkpoint, or one of compressed-tensors",
    )

    evaluate = command("eval", _eval, "Run a pack over a text: perplexity and speed.")
    evaluate.add_argument("pack_dir", type=Path)
    evaluate.add_argument("--text", type=Path, required=True, metavar="FILE")
    evaluate.add_argument("--windows", type=int, metavar="N", help="how many windows of the text")
    evaluate.add_argument("--window-tokens", type=int, metavar="T", help="tokens of a window")

    predict_command.add(command)
    doctor_command.add(command)

    for name, about in (
        ("status", "Show the daemon, its tiers and what it has done."),
        ("models", "List the models that the daemon serves."),
        ("layers", "List the layers of a model and where they are."),
        ("clients", "List the connected clients, their plans and leases."),
        ("config", "Show every setting in effect and where it came from."),
        ("pin", "Keep layers of a model in memory, all or those named."),
        ("unpin", "Let pinned layers go again, all of a model or those named."),
        ("evict", "Empty layers of a model that nobody holds, all or those named."),
        ("reload", "Look for added, replaced and removed packs."),
    ):
        sub = command(name, _ask, about)
        sub.add_argument("--socket", help="default: $TIERD_SOCKET, then the usual places")
        if name in _OF_A_MODEL:
            sub.add_argument("model")
        if name in ("pin", "unpin", "evict"):
            sub.add_argument("layers", nargs="*", metavar="LAYER", help="a name or a glob")
    budget = command("budget", _budget, "Change the budget of a tier while the daemon runs.")
    budget.add_argument("tier", help="dram, or gpu:N")
    budget.add_argument("size", metavar="SIZE", help="e.g. 20GiB")
    budget.add_argument("--socket", help="default: $TIERD_SOCKET, then the usual places")
    _add_record(command)
    return top


def _add_record(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands about the record of all decisions."""
    why = command("why", _why, "Say in a sentence why a layer is where it is.")
    why.add_argument("model")
    why.add_argument("layer", help="its name, or its number")
    why.add_argument("--tier", default="dram", help="dram (default), or gpu:N")
    why.add_argument("--history", action="store_true", help="print what was decided about it, too")
    trace = command("trace", _trace, "Write what was decided, for Perfetto and for replay.")
    trace.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    trace.add_argument(
        "--seconds", type=float, default=0.0, metavar="N",
        help="record on for so long; default: what the daemon remembers",
    )  # fmt: skip
    for sub in (why, trace):
        sub.add_argument("--socket", help="default: $TIERD_SOCKET, then the usual places")
    replay = command("replay", _replay, "Run a recorded day against other budgets and policies.")
    replay.add_argument("trace", type=Path, metavar="TRACE", help="a file of `tierctl trace`")
    replay.add_argument(
        "--policy", action="append", default=[], metavar="POLICY",
        choices=("next-use", "lru", "lfu", "mru", "pin-first-n", "min"),
        help="next-use (tierd), lru, lfu, mru, pin-first-n, or min (the bound); default: all",
    )  # fmt: skip
    replay.add_argument(
        "--dram", action="append", default=[], metavar="SIZE", help="a budget; default: as recorded"
    )
    replay.add_argument(
        "--tier", default="dram",
        help="whose day: dram (default), or gpu:N: its reads are copies, --dram is its budget",
    )  # fmt: skip
    replay.add_argument(
        "--ssd-bandwidth", metavar="BANDWIDTH", help="e.g. 3GB/s; default: of the recorded reads"
    )


def _add_pack_settings(pack: argparse.ArgumentParser) -> None:
    pack.add_argument(
        "--codec",
        choices=pack_settings.CODECS,
        default="lossless",
        help="how weights are stored; lossless: of each tensor the smallest form (the default)",
    )
    pack.add_argument(
        "--group", type=int, help="columns that share a scale, of int8 and int4 (128)"
    )
    pack.add_argument("--prune", choices=pack_settings.PRUNINGS, default="none")
    pack.add_argument("--sparsity", type=float, metavar="S", help="share of zeros, 0 <= S < 1")
    pack.add_argument(
        "--sparsity-of",
        action="append",
        default=[],
        metavar="PATTERN=S",
        help="another share for what the glob matches, tensor or module; the last match counts",
    )
    pack.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="neither prune nor quantise what the glob matches, tensor or module",
    )
    pack.add_argument("--calibration", type=Path, metavar="TEXT", help="a text for --prune wanda")
    pack.add_argument(
        "--calibration-windows",
        type=int,
        metavar="N",
        help=f"how many windows of the text to run ({pack_settings.DEFAULT_WINDOWS})",
    )


def _progress(arguments: argparse.Namespace) -> Progress:
    from tierd_tools import progress

    return progress.SilentProgress() if arguments.json else progress.for_stream(sys.stderr)


def _pack(arguments: argparse.Namespace) -> Any:
    from tierd_tools import pack

    return pack.pack(
        arguments.model_dir,
        arguments.pack_dir,
        codec=arguments.codec,
        group=arguments.group,
        prune=arguments.prune,
        sparsity=arguments.sparsity,
        sparsity_of=arguments.sparsity_of,
        keep=arguments.keep,
        calibration=arguments.calibration,
        calibration_windows=arguments.calibration_windows,
        progress=_progress(arguments),
    )


def _verify(arguments: argparse.Namespace) -> Any:
    from tierd_tools import verify

    return verify.verify(arguments.pack_dir, progress=_progress(arguments))


def _unpack(arguments: argparse.Namespace) -> Any:
    from tierd_tools import unpack

    return unpack.unpack(
        arguments.pack_dir,
        arguments.out_dir,
        format=arguments.format,
        progress=_progress(arguments),
    )


def _eval(arguments: argparse.Namespace) -> Any:
    from tierd_tools import evaluate

    said = {"windows": arguments.windows, "window_tokens": arguments.window_tokens}
    return evaluate.evaluate(
        arguments.pack_dir,
        arguments.text,
        **{name: value for name, value in said.items() if value is not None},
        progress=_progress(arguments),
    )


def _ask(arguments: argparse.Namespace) -> render.Reply:
    fields: dict[str, Any] = {}
    if arguments.command in _OF_A_MODEL:
        fields["model"] = check_model_name(arguments.model)
    if layers := getattr(arguments, "layers", None):
        fields["layers"] = layers
    return ask(_socket(arguments), arguments.command, **fields)


def _budget(arguments: argparse.Namespace) -> render.Reply:
    try:
        nbytes = parse_size(arguments.size)
    except ValueError as error:
        raise BadSetting(f"budget: {error}") from error
    return ask(_socket(arguments), "budget", tier=arguments.tier, bytes=nbytes)


def _socket(arguments: argparse.Namespace) -> str | None:
    if arguments.socket == "":  # `--socket "$UNSET"` must not end at another daemon
        raise BadSetting("--socket '' is no path")
    return arguments.socket  # type: ignore[no-any-return]


def _why(arguments: argparse.Namespace) -> render.Reply:
    from tierd_tools import why

    reply = why.why(_socket(arguments), arguments.model, arguments.layer, arguments.tier)
    if not (arguments.history or arguments.json):
        del reply["history"]
    return reply


def _trace(arguments: argparse.Namespace) -> Any:
    from tierd_tools import trace

    if not 0 <= arguments.seconds < 1e6:
        raise BadSetting(f"--seconds {arguments.seconds} is not a number from 0 to 1000000")
    return trace.trace(_socket(arguments), arguments.output, arguments.seconds)


def _replay(arguments: argparse.Namespace) -> render.Reply:
    from tierd_tools import replay

    return replay.run(
        arguments.trace, arguments.policy, arguments.dram, arguments.ssd_bandwidth, arguments.tier
    )


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
    except (BadSetting, SocketPathTooLong) as error:
        print(f"tierctl: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:  # `tierctl ... | head`: nobody wants the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ToolError, FormatError, OSError) as error:
        print(f"tierctl: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        resumes = "; a pack run resumes where it stopped" if arguments.command == "pack" else ""
        print(f"tierctl: interrupted{resumes}", file=sys.stderr)
        return FAILURE


if __name__ == "__main__":
    sys.exit(main())
