"""How long is the round trip of a lease on a resident layer, while the SSD is read at full speed?

One client asks again and again for a small layer that it keeps resident; seven others are
connected, one of which runs through a model larger than the budget as fast as it can be read.
Between bursts the same client sends frames of the same size to a process that only echoes them:
what the sockets and the scheduler of this machine cost without any daemon.
"""

from __future__ import annotations

import multiprocessing
import socket
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import tierd_client
from tierd_tools import random_model
from tierd_tools.benchmark import Row
from tierd_tools.serving import serve

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

WORK = Path("build/bench/acquire")
CLIENTS = 8
ROUND_TRIPS = 20_000
BURST = 100
ECHO_BYTES = 100
#: Decoder layers of 50 MB when packed, as in the demo.
LARGE = random_model.Shape(
    hidden=2048, intermediate=5632, layers=6, heads=32, kv_heads=4, vocabulary=8000
)
P50_US, P99_US = 60.0, 500.0


def run() -> list[Row]:
    packs = _packs()
    budget = sum(file.stat().st_size for file in (packs / "large").iterdir()) // 2
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    ours, theirs = socket.socketpair()
    echo = context.Process(target=_echo, args=(theirs,))
    echo.start()
    theirs.close()
    with ours, serve(["--models", str(packs), "--dram", str(budget)], WORK / "log") as daemon:
        others = [
            context.Process(target=_other, args=(daemon.socket, number == 0, stop))
            for number in range(CLIENTS - 1)
        ]
        for process in others:
            process.start()
        try:
            with tierd_client.Client(daemon.socket, name="asking") as client:
                while len(client.ask("clients")["clients"]) < CLIENTS:
                    time.sleep(0.05)
                before = client.ask("status")["ssd"]["read_bytes"]
                begin = time.monotonic()
                trips_us, echoes_us = _measure(client, ours)
                seconds = time.monotonic() - begin
                read = client.ask("status")["ssd"]["read_bytes"] - before
        finally:
            stop.set()
            for process in others:
                process.join(10)
    echo.join(10)
    (p50, p99), (echo_p50, echo_p99) = _percentiles(trips_us), _percentiles(echoes_us)
    beside = f"{CLIENTS - 1} others, SSD at {read / seconds / 1e6:.0f} MB/s"
    return [
        Row(f"acquire, p50, {beside}, against the bound", p50, P50_US, "us", at_most=1.0),
        Row(f"acquire, p99, {beside}, against the bound", p99, P99_US, "us", at_most=1.0),
        Row("acquire, p50, against a bare echo", p50, echo_p50, "us"),
        Row("acquire, p99, against a bare echo", p99, echo_p99, "us"),
    ]


def _percentiles(values: list[float]) -> tuple[float, float]:
    return statistics.median(values), sorted(values)[len(values) * 99 // 100]


def _measure(client: tierd_client.Client, echo: socket.socket) -> tuple[list[float], list[float]]:
    """Microseconds of acquires, and of bare echoes. What was granted is given back between
    bursts, so that the round trips are of acquires alone."""
    opened = client.open("small")
    layer = opened.layer_index("model.layers.0")
    trips_us: list[float] = []
    echoes_us: list[float] = []
    frame = bytes(ECHO_BYTES)
    with opened.acquire(layer):  # keeps it resident
        while len(trips_us) < ROUND_TRIPS:
            leases = []
            for _ in range(BURST):
                begin = time.perf_counter_ns()
                leases.append(opened.acquire(layer))
                trips_us.append((time.perf_counter_ns() - begin) / 1e3)
            for lease in leases:
                lease.release()
            client.ask("config")  # answered after all releases
            for _ in range(BURST):
                begin = time.perf_counter_ns()
                echo.sendall(frame)
                echo.recv(ECHO_BYTES)
                echoes_us.append((time.perf_counter_ns() - begin) / 1e3)
    return trips_us, echoes_us


def _echo(sock: socket.socket) -> None:
    while data := sock.recv(ECHO_BYTES):
        sock.sendall(data)


def _other(socket: str, reading: bool, stop: Event) -> None:
    """A connected client; a reading one goes through the large model without computing."""
    with tierd_client.Client(socket, name="reading" if reading else "idle") as client:
        opened = client.open("large")
        layers = range(len(opened.index.layers))
        if reading:
            opened.plan(layers)
        while not stop.is_set():
            if not reading:
                stop.wait(0.2)
                continue
            for layer in layers:
                opened.acquire(layer).release()


def _packs() -> Path:
    """A large and a small model, packed once."""
    packs = WORK / "packs"
    random_model.write_pack(packs / "large", LARGE)
    random_model.write_pack(packs / "small", random_model.TINY)
    return packs
