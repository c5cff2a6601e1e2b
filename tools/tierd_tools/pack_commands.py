"""The commands of tierctl that read and write packs: pack, verify, unpack, eval."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierd_tools import pack_settings
from tierd_tools.command_line import progress

if TYPE_CHECKING:
    import argparse

    from tierd_tools.command_line import Command


def add(command: Command) -> None:
    """Add the commands."""
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
        progress=progress(arguments),
    )


def _verify(arguments: argparse.Namespace) -> Any:
    from tierd_tools import verify

    return verify.verify(arguments.pack_dir, progress=progress(arguments))


def _unpack(arguments: argparse.Namespace) -> Any:
    from tierd_tools import unpack

    return unpack.unpack(
        arguments.pack_dir,
        arguments.out_dir,
        format=arguments.format,
        progress=progress(arguments),
    )


def _eval(arguments: argparse.Namespace) -> Any:
    from tierd_tools import evaluate

    said = {"windows": arguments.windows, "window_tokens": arguments.window_tokens}
    return evaluate.evaluate(
        arguments.pack_dir,
        arguments.text,
        **{name: value for name, value in said.items() if value is not None},
        progress=progress(arguments),
    )
