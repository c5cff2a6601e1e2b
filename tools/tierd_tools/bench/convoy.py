"""Do processes of one model share their reads, and does a small client get its share?

A real daemon and real client processes. Light ones (`light_client`) take every lease that a model
takes and sleep in place of computing: the arithmetic of four models does not fit beside each other
on few cores, and the daemon sees no difference. The last rows are four real models.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierd_tools import random_model, random_pack
from tierd_tools.benchmark import Row
from tierd_tools.demo.model_processes import run_workers
from tierd_tools.diagnostics import ask
from tierd_tools.serving import serve

if TYPE_CHECKING:
    from collections.abc import Sequence

WORK = Path("build/bench/convoy")
LAYER_BYTES = 4 << 20
LAYERS, CACHE = 24, 12  #: of the model that several share; layers that the budget holds
DEEP_LAYERS = 48  #: of the models of the greedy client and the small one beside it
PROCESSES = 4
COMPUTE_S = 0.004  #: of a layer
#: What does not fit, 14 layers a pass, takes 0.92 s; the compute of four processes takes 0.38 s.
SLOW = 64_000_000
FAST = 256_000_000  #: for the greedy client and the small one
START_S = 1.3  #: clients begin up to so much apart, at no multiple of a pass
WARM_S, MEASURED_S = 5.0, 7.0
ROUNDS = 3
NEW_TOKENS = 12
#: For them: what does not fit takes 2 s a pass, more than four of them compute on two cores.
REAL_SLOW = 30_000_000
#: Real, of 0.3 GB in bf16; a small vocabulary, because each client reserves its largest layer.
REAL = random_model.Shape(
    hidden=1024, intermediate=2816, layers=12, heads=16, kv_heads=4, vocabulary=1000
)


@dataclass(frozen=True, slots=True)
class Light:
    """How one light client is started."""

    model: str = "shared"
    compute_s: float = COMPUTE_S
    lookahead: int = 1
    start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ran:
    """What one light client did."""

    layers: int
    at_s: list[float]
    stall_s: list[float]

    def passes_a_second(self, begin: float, end: float) -> float:
        return sum(begin < at <= end for at in self.at_s) / self.layers / (end - begin)

    def stall_per_layer(self, begin: float, end: float) -> float:
        found = [s for s, at in zip(self.stall_s, self.at_s, strict=True) if begin < at <= end]
        return statistics.mean(found)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: its clients, and what was read from the SSD in the time that counts."""

    clients: list[Ran]
    begin_s: float
    end_s: float
    read_bytes: int

    @property
    def tokens_a_second(self) -> float:
        """Of all clients together; a pass is a token."""
        return sum(client.passes_a_second(self.begin_s, self.end_s) for client in self.clients)

    @property
    def bytes_a_pass(self) -> float:
        """Read from the SSD in the time of a pass of all clients."""
        one = self.tokens_a_second / len(self.clients)
        return self.read_bytes / (self.end_s - self.begin_s) / one


def run() -> list[Row]:
    random_pack.write(WORK / "packs" / "shared", LAYERS, LAYER_BYTES)
    random_pack.write(WORK / "packs" / "greedy", DEEP_LAYERS, LAYER_BYTES)
    random_pack.write(WORK / "packs" / "small", DEEP_LAYERS, LAYER_BYTES)
    return [*_shared_rows(), *_late_rows(), *_greedy_rows(), *_real_rows()]


def _shared_rows() -> list[Row]:
    """Four light processes against one."""
    four = [Light(start_s=START_S * number / PROCESSES) for number in range(PROCESSES)]
    throttled: dict[int, list[Outcome]] = {1: [], PROCESSES: []}
    free: dict[int, list[Outcome]] = {1: [], PROCESSES: []}
    for _ in range(ROUNDS):
        for clients in (four[:1], four):
            throttled[len(clients)].append(_run(clients, SLOW))
    for clients in (four[:1], four):
        free[len(clients)].append(_run(clients, None))
    compute = PROCESSES * LAYERS * COMPUTE_S
    mb = LAYERS * LAYER_BYTES / 1e6
    light = f"{PROCESSES} light processes (modelled compute), model {mb:.0f} MB, budget half of it"
    slow = f"{light}, SSD at {SLOW / 1e6:.0f} MB/s (one pass 0.9 s, compute of all {compute:.2f} s)"
    rows = []
    for name, runs, bounded in ((slow, throttled, True), (f"{light}, unthrottled", free, False)):
        together, alone = runs[PROCESSES], runs[1]
        rows += [
            Row(f"{name}: SSD bytes a pass, against one", _median_bytes(together) / 1e6,
                _median_bytes(alone) / 1e6, "MB", at_most=1.1 if bounded else None),
            Row(f"{name}: tokens, against one", _median_tokens(together), _median_tokens(alone),
                "tokens/s", at_least=3.5 if bounded else None),
        ]  # fmt: skip
    return rows


def _late_rows() -> list[Row]:
    """Three are in phase; what a fourth costs them while it joins."""
    lost = []
    for number in range(ROUNDS):
        late_s = WARM_S + 0.31 * number  # at another place of the others' pass each time
        clients = [*[Light(start_s=0.1 * n) for n in range(3)], Light(start_s=late_s)]
        outcome = _run(clients, SLOW, before_s=late_s)
        for client in outcome.clients[:3]:
            joined = outcome.clients[3].at_s[0]
            before = client.passes_a_second(joined - 3.0, joined)
            after = client.passes_a_second(joined, joined + MEASURED_S - 1)
            lost.append((before - after) * (MEASURED_S - 1))
    return [
        Row("a process joins late: passes that each of the others loses, the worst of "
            f"{len(lost)}, against the bound", max(lost), 1.0, "passes", at_most=1.0)
    ]  # fmt: skip


def _greedy_rows() -> list[Row]:
    """A small interactive client beside one that wants everything, eight layers ahead."""
    small = Light("small")
    greedy = Light("greedy", compute_s=0.0, lookahead=8)
    beside, alone = [], []
    for _ in range(ROUNDS):
        outcome = _run([small, greedy], FAST)
        beside.append(outcome.clients[0].stall_per_layer(outcome.begin_s, outcome.end_s))
        outcome = _run([small], FAST // 2)
        alone.append(outcome.clients[0].stall_per_layer(outcome.begin_s, outcome.end_s))
    return [
        Row("a small client beside a greedy one (8 layers ahead), both models 4 times the budget: "
            f"its stall a layer at {FAST / 1e6:.0f} MB/s, against alone at half of it",
            statistics.median(beside) * 1e3, statistics.median(alone) * 1e3, "ms", at_most=1.5)
    ]  # fmt: skip


def _run(clients: Sequence[Light], bandwidth: int | None, before_s: float = 0.0) -> Outcome:
    """Starts the daemon and these clients. What counts begins `WARM_S` after `before_s`."""
    flags = ["--models", str(WORK / "packs"), "--dram", str(CACHE * LAYER_BYTES)]
    flags += ["--ssd-bandwidth", str(bandwidth)] if bandwidth else []
    last = max(client.start_s for client in clients)
    with serve(flags, WORK / "log") as daemon:
        processes = [
            _start(daemon.socket, client, last + WARM_S + MEASURED_S + 2 - client.start_s)
            for client in clients
        ]
        while len(ask(daemon.socket, "clients")["clients"]) < sum(c.start_s < 0.5 for c in clients):
            time.sleep(0.02)
        time.sleep(max(before_s, last) + (0.0 if before_s else WARM_S))
        begin, read = time.monotonic(), ask(daemon.socket, "status")["ssd"]["read_bytes"]
        time.sleep(MEASURED_S)
        end, read_after = time.monotonic(), ask(daemon.socket, "status")["ssd"]["read_bytes"]
        ran = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    return Outcome([Ran(**result) for result in ran], begin, end, read_after - read)


def _start(socket: str, client: Light, seconds: float) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "tierd_tools.light_client", "--socket", socket]
    argv += ["--model", client.model, "--compute", str(client.compute_s)]
    argv += ["--lookahead", str(client.lookahead), "--start", str(client.start_s)]
    argv += ["--seconds", str(seconds)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def _median_bytes(outcomes: Sequence[Outcome]) -> float:
    return statistics.median(outcome.bytes_a_pass for outcome in outcomes)


def _median_tokens(outcomes: Sequence[Outcome]) -> float:
    return statistics.median(outcome.tokens_a_second for outcome in outcomes)


# --------------------------------------------------------------------------------------------------
# Real models


def _real_rows() -> list[Row]:
    """Four processes that generate with a real model, on one thread each, against one."""
    packs = WORK / "real"
    random_model.write_pack(packs / "random", REAL)
    budget = sum(file.stat().st_size for file in (packs / "random").iterdir()) // 2
    one, four = _real_run(packs, budget, 1), _real_run(packs, budget, PROCESSES)
    name = (
        f"{PROCESSES} real models of {2 * budget / 1e6:.0f} MB, budget half of it, one thread "
        f"each, SSD at {REAL_SLOW / 1e6:.0f} MB/s"
    )
    return [
        Row(f"{name}: SSD bytes a token of all, against one", four["bytes_a_pass"] / 1e6,
            one["bytes_a_pass"] / 1e6, "MB", at_most=1.1),
        Row(f"{name}: tokens, against one",
            four["tokens_a_second"], one["tokens_a_second"], "tokens/s"),
    ]  # fmt: skip


def _real_run(packs: Path, budget: int, processes: int) -> dict[str, float]:
    flags = ["--models", str(packs), "--dram", str(budget), "--ssd-bandwidth", str(REAL_SLOW)]
    with serve(flags, WORK / "log-real") as daemon:
        argv = [sys.executable, "-m", "tierd_tools.demo.worker", "tierd", "--threads", "1"]
        argv += ["--model", "random", "--socket", daemon.socket, "--new-tokens", str(NEW_TOKENS)]
        before: list[int] = []

        def note() -> None:
            before.append(ask(daemon.socket, "status")["ssd"]["read_bytes"])

        results: list[dict[str, Any]] = run_workers([argv] * processes, WORK / "log-workers", note)
        read = ask(daemon.socket, "status")["ssd"]["read_bytes"] - before[0]
    begin = min(result["at_ns"][0] for result in results)
    end = max(result["at_ns"][-1] for result in results)
    tokens = sum(len(result["at_ns"]) - 1 for result in results)
    return {"bytes_a_pass": read / NEW_TOKENS, "tokens_a_second": tokens * 1e9 / (end - begin)}
