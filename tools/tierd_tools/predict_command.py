"""The arguments of `tierctl predict`, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierd.sizes import parse_size
from tierd_tools.errors import BadSetting

if TYPE_CHECKING:
    from tierd_tools.command_line import Command

LONGEST = 1e9  #: seconds of compute, microseconds of latency


def add(command: Command) -> None:
    """Add the command."""
    sub = command("predict", _predict, "Say how fast a model would be on a machine of given sizes.")
    sub.add_argument("--model", type=Path, metavar="PACK", help="a pack; only its index is read")
    sub.add_argument("--layers", type=_count, metavar="N", help="instead of a pack: equal layers")
    sub.add_argument("--layer-bytes", type=_size, metavar="SIZE", help="of each of them")
    sub.add_argument(
        "--dram", type=_size, required=True, metavar="SIZE", help="tierd's budget, in 2 MiB pages"
    )
    sub.add_argument(
        "--ssd", type=_bandwidth, required=True, metavar="BANDWIDTH", help="e.g. 3GB/s"
    )
    sub.add_argument("--latency", type=float, default=100.0, metavar="US", help="of a read (100)")
    sub.add_argument("--gpu", type=_size, metavar="SIZE", help="tierd's budget on the GPU")
    sub.add_argument(
        "--copy", type=_bandwidth, metavar="BANDWIDTH", help="DRAM to GPU (default 25GB/s)"
    )
    sub.add_argument("--direct", action="store_true", help="the GPU reads past DRAM (gpu_direct)")
    compute = sub.add_mutually_exclusive_group()
    compute.add_argument(
        "--compute", type=float, metavar="SECONDS", help="of a token, with everything resident"
    )
    compute.add_argument(
        "--memory-bandwidth",
        type=_bandwidth,
        metavar="BANDWIDTH",
        help="packed bytes that a client computes with in a second",
    )
    sub.add_argument("--clients", type=_count, default=1, metavar="N", help="processes (1)")
    sub.add_argument(
        "--tokens-per-pass", type=_count, default=1, metavar="K", help="of a batch, or verified (1)"
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bandwidth(text: str) -> int:
    return _size(text.removesuffix("/s"))


def _predict(arguments: argparse.Namespace) -> Any:
    from tierd.sim.steady import Node
    from tierd_tools import predict

    equal = (arguments.layers, arguments.layer_bytes)
    if [value is None for value in (arguments.model, *equal)] not in (
        [False, True, True], [True, False, False],
    ):  # fmt: skip
        raise BadSetting("give --model PACK, or --layers N and --layer-bytes SIZE")
    if arguments.copy is not None and arguments.gpu is None:
        raise BadSetting("--copy is the bandwidth to a GPU: give --gpu SIZE too")
    if arguments.direct and arguments.gpu is None:
        raise BadSetting("--direct is how a GPU reads: give --gpu SIZE too")
    for name in ("compute", "latency"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value <= LONGEST:
            raise BadSetting(f"--{name} {value:g}: expected a time from 0 to {LONGEST:g}")
    model = predict.of_pack(arguments.model) if arguments.model else predict.of_layers(*equal)
    compute = arguments.compute
    return predict.predict(
        model,
        Node(
            dram_bytes=arguments.dram,
            ssd_bytes_per_s=arguments.ssd,
            latency_ns=int(arguments.latency * 1000),
            gpu_bytes=arguments.gpu,
            copy_bytes_per_s=arguments.copy or predict.USUAL_COPY,
            direct=arguments.direct,
        ),
        compute_seconds=None if compute is None else compute * arguments.tokens_per_pass,
        memory_bandwidth=arguments.memory_bandwidth,
        clients=arguments.clients,
        tokens_per_pass=arguments.tokens_per_pass,
    )
