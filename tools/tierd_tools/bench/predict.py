"""Is what tierd predicts within 15 % of what then happens?

A daemon for each budget and each binding stage serves one model to a client in this process. The
client's compute is measured beside them with a budget for everything. Where the SSD shall bind,
`--ssd-bandwidth` makes reading take at least three times the compute, and is at most a quarter of
what the device gives; where the compute shall bind, a pass has so many tokens that a quarter of the
device is fast enough. In each round a side is predicted, then measured: its daemon's figures and
the compute are those of that moment.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierd.sim.steady import Node
from tierd_tools import predict, random_model
from tierd_tools.benchmark import Row
from tierd_tools.diagnostics import ask
from tierd_tools.serving import serve

if TYPE_CHECKING:
    from collections.abc import Iterator

WORK = Path("build/bench/predict")
#: Decoder layers of 8 MB when packed.
SHAPE = random_model.Shape(
    hidden=1024, intermediate=2816, layers=16, heads=16, kv_heads=4, vocabulary=8000
)
SHARES = (0.25, 0.5, 0.75)
SLOWER = 3.0  #: reading takes this many times the compute where the SSD shall bind
QUARTER = 0.25  #: of the device, whose bandwidth may change meanwhile
MOST_TOKENS = 1024
ROUNDS = 5
WARM_PASSES, PASSES = 1, 3
FIRST_PASSES = 8  #: fill the memory, and let the daemon see how its device and its client are
TOLERANCE = 0.15


@dataclass(slots=True, eq=False)
class Side:
    """One daemon, one client, and the seconds of a pass in each round: as they were, as `tierctl
    predict` said, as `tierctl clients` said."""

    share: float
    tokens: int  #: of a pass
    limited: bool
    socket: str
    model: Any
    budget: int
    seconds: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    live: list[float] = field(default_factory=list)
    bound_by: list[str] = field(default_factory=list)


def run() -> list[Row]:
    pack = WORK / "model"
    random_model.write_pack(pack, SHAPE)
    model = predict.of_pack(pack)
    with contextlib.ExitStack() as stack:

        def side(share: float, tokens: int, bandwidth: int | None = None) -> Side:
            found = stack.enter_context(
                _side(pack, int(model.nbytes * share), share, tokens, bandwidth)
            )
            _measure(found, tokens, FIRST_PASSES)
            return found

        resident = side(1.5, 1)
        compute_seconds = _measure(resident, 1, PASSES)
        free = [side(share, 1) for share in SHARES]
        bandwidth = QUARTER * min(_bandwidth(one) for one in free)
        sides = []
        tokens = _tokens(resident, model.nbytes * (1 - min(SHARES)) / bandwidth)
        for one in free:
            one.tokens = tokens
            missing = model.nbytes * (1 - one.share)
            limit = min(missing / (SLOWER * compute_seconds), bandwidth)
            sides += [side(one.share, 1, int(limit)), one]
        for _ in range(ROUNDS):
            for one in sides:
                _measure(one, one.tokens, WARM_PASSES)
                _predict(model, one, _measure(resident, one.tokens, PASSES))
                one.seconds.append(_measure(one, one.tokens, PASSES))
        return [row for one in sides for row in _rows(one)]


@contextlib.contextmanager
def _side(
    pack: Path, budget: int, share: float, tokens: int, bandwidth: int | None
) -> Iterator[Side]:
    import tierd_client

    flags = ["--pack", str(pack), "--dram", str(budget)]
    if bandwidth is not None:
        flags += ["--ssd-bandwidth", str(bandwidth)]
    log = WORK / f"{share:.0%}-{'limited' if bandwidth else 'free'}.log"
    with serve(flags, log) as daemon:
        model = tierd_client.load_model(pack.name, socket=daemon.socket)
        with model.tierd:
            yield Side(share, tokens, bandwidth is not None, daemon.socket, model, budget)


def _measure(side: Side, tokens: int, passes: int) -> float:
    """Seconds of a pass over so many tokens, the mean of several."""
    import torch

    ids = torch.arange(3, 3 + tokens).reshape(1, tokens)
    with torch.inference_mode():
        begin = time.perf_counter()
        for _ in range(passes):
            side.model(input_ids=ids, use_cache=False)
        return (time.perf_counter() - begin) / passes


def _bandwidth(side: Side) -> int:
    """What the daemon measured of its device."""
    [device] = ask(side.socket, "status")["ssd"]["devices"]
    return int(device["bytes_per_s"])


def _tokens(resident: Side, seconds: float) -> int:
    """So many that a pass over them computes for as long."""
    tokens = 1
    while tokens < MOST_TOKENS and _measure(resident, tokens, 1) < seconds:
        tokens *= 2
    return tokens


def _predict(model: predict.Model, side: Side, compute_seconds: float) -> None:
    """What `tierctl predict` says of this side, and what `tierctl clients` does, at present."""
    status = ask(side.socket, "status")
    [device] = status["ssd"]["devices"]
    node = Node(
        side.budget,
        device["bytes_per_s"],
        latency_ns=device["latency_ns"],
        reads_in_flight=device["reads_in_flight"],
        granule_bytes=4096 if status["dram"]["pages"].startswith("4 KiB") else 2 << 20,
    )
    found = predict.predict(model, node, compute_seconds=compute_seconds)
    side.predicted.append(found.seconds_per_token)
    side.bound_by.append(found.binds)
    clients = ask(side.socket, "clients")["clients"]
    [live] = [client["predicted"] for client in clients if client["predicted"] is not None]
    side.live.append(live["pass_ns"] / 1e9)


def _rows(side: Side) -> list[Row]:
    measured, predicted = statistics.median(side.seconds), statistics.median(side.predicted)
    ssd = "limited" if side.limited else "as it is"
    where = f"DRAM {side.share:.0%}, {side.tokens} tokens a pass, SSD {ssd}"
    bound = statistics.mode(side.bound_by)
    return [
        Row(f"{where}: tierctl predict ({bound} binds), and measured", predicted, measured,
            "s/pass"),
        Row(f"{where}: error of that, against the bound", abs(predicted / measured - 1),
            TOLERANCE, "share", at_most=1.0),
        Row(f"{where}: tierctl clients, and measured", statistics.median(side.live), measured,
            "s/pass"),
    ]  # fmt: skip
