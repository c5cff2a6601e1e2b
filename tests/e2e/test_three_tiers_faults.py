"""Clients of all tiers for a few seconds, while disk and GPUs fail now and then, models come and
go, budgets change: whoever is granted a layer reads its bytes, and the daemon lives.

What fails, and when, is drawn with a seed; threads and the machine decide the rest.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.conftest import PackOnDisk, RawClient, Refused, RunningDaemon, write_pack
from tests.daemon.played_cufile import build
from tests.e2e.gpu_client import GpuClient
from tierd.gpu_settings import PLAYED_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

MIB = 1 << 20
#: Layers of two blocks and a part of one, over chunks whose borders lie elsewhere.
LAYERS, LAYER_BYTES, CHUNK_BYTES = 5, 9 * MIB, 2 * MIB
BUDGETS = {"dram": 40 * MIB, "gpu:0": 40 * MIB, "gpu:1": 30 * MIB}
TIERS = ("gpu:0", "gpu:0", "gpu:1", "dram")
SECONDS = 5.0

_FAULTY = """
import os, random, sys, time
chance, preadv = random.Random({seed}), os.preadv

def faulty(fd, targets, offset):
    drawn = chance.random()
    if drawn < 0.03:
        raise OSError(5, "Input/output error")
    if drawn < 0.3:
        time.sleep(chance.random() * 0.05)
    return preadv(fd, targets, offset)

os.preadv = faulty
from tierd.gpu import memfd_device
from tierd.gpu.errors import DeviceError
really = memfd_device.MemfdDevice.copy

def copy(self, *arguments):
    if chance.random() < 0.02:
        raise DeviceError("gpu: no copy")
    return really(self, *arguments)

memfd_device.MemfdDevice.copy = copy
from tierd.__main__ import main
sys.exit(main())
"""


@dataclass
class Crowd:
    """What clients of one daemon saw, until `until_s`."""

    daemon: RunningDaemon
    packs: dict[str, PackOnDisk]
    until_s: float
    seen: Counter[str] = field(default_factory=Counter)  #: "granted", or the code of a refusal
    problems: list[object] = field(default_factory=list)

    def live(self, tier: str, chance: random.Random) -> None:
        """One client after the other."""
        try:
            while time.monotonic() < self.until_s:
                client = RawClient(self.daemon.socket) if tier == "dram" else self._gpu(tier)
                with contextlib.closing(client):
                    if tier == "dram":
                        client.hello()
                    self._use(client, chance)
        except BaseException as problem:
            self.problems.append(problem)

    def _gpu(self, tier: str) -> GpuClient:
        client = GpuClient(self.daemon.socket)
        client.greet(tier)
        return client

    def _use(self, client: RawClient, chance: random.Random) -> None:
        name = chance.choice(sorted(self.packs))
        try:
            model: Any = (
                client.open_gpu(name) if isinstance(client, GpuClient) else client.open(name)
            )
            if chance.random() < 0.7:
                order = list(range(LAYERS))
                client.call(
                    "plan", model_id=model.model_id, order=order, lookahead=chance.randint(0, 2)
                )
        except Refused as refused:
            self.seen[refused.code] += 1
            return
        for _ in range(chance.randint(1, 12)):
            layer = chance.randrange(LAYERS)
            if chance.random() < 0.05:
                client.send("acquire", model_id=model.model_id, layer=layer)
                return  # and is gone while its layer is on the way
            try:
                lease = model.acquire(layer)
            except Refused as refused:
                self.seen[refused.code] += 1
                if refused.code == "model_removed":
                    return
                continue
            if isinstance(client, GpuClient):
                model.map(lease)
            self.seen["granted"] += 1
            if model.bytes_of(lease) != self.packs[name].content[layer]:
                self.problems.append(f"layer {layer} of {name} has other bytes")
            model.release(lease)

    def disturb(self, folder: Path, chance: random.Random) -> None:
        """An operator who takes a model away and puts it back, changes budgets, evicts."""
        shown, aside = folder / "models" / "c", folder / "c"
        while time.monotonic() < self.until_s and not self.problems:
            time.sleep(chance.random() * 0.5)
            drawn = chance.random()
            with contextlib.suppress(Refused):
                if drawn < 0.5:
                    shown.rename(aside) if shown.exists() else aside.rename(shown)
                    self.daemon.ask("reload")
                elif drawn < 0.8:
                    nbytes = chance.choice([26, 30, 34, 40]) * MIB
                    self.daemon.ask("budget", tier=chance.choice(sorted(BUDGETS)), bytes=nbytes)
                else:
                    self.daemon.ask("evict", model=chance.choice("ab"))


@pytest.fixture(scope="module")
def cufile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cufile"))


@pytest.fixture
def packs(tmp_path: Path) -> dict[str, PackOnDisk]:
    models = tmp_path / "models"
    models.mkdir()
    return {
        name: write_pack(models / name, LAYERS, LAYER_BYTES, seed=seed)
        for seed, name in enumerate("abc")
    }


@contextlib.contextmanager
def daemon_of(folder: Path, seed: int, *more: str, **environ: str) -> Iterator[RunningDaemon]:
    flags = [
        *("--models", str(folder / "models"), "--dram", str(BUDGETS["dram"])),
        *("--gpu", f"0={BUDGETS['gpu:0']}", "--gpu", f"1={BUDGETS['gpu:1']}"),
        *("--gpu-device", "memfd", "--gpu-chunk", str(CHUNK_BYTES)),
        *("--readers", "3", "--read-chunk", "4MiB", "--ssd-bandwidth", "300MB"),
        *("--gpu-copy-bandwidth", "400MB"), *more,
    ]  # fmt: skip
    program = ("-c", _FAULTY.format(seed=seed))
    daemon = RunningDaemon(str(folder / "socket"), folder / "log", flags, environ, program=program)
    try:
        yield daemon.wait_ready()
    finally:
        daemon.kill()


@pytest.mark.parametrize(("direct", "seed"), [(False, 1), (True, 2)])
def test_whoever_is_granted_a_layer_reads_its_bytes_whatever_fails_around_it(
    tmp_path: Path, packs: dict[str, PackOnDisk], cufile: Path, direct: bool, seed: int
) -> None:
    more = ["--gpu-direct"] if direct else []
    environ = {PLAYED_VARIABLE: str(cufile)} if direct else {}
    with daemon_of(tmp_path, seed, *more, **environ) as daemon:
        crowd = Crowd(daemon, packs, time.monotonic() + SECONDS)
        threads = [
            threading.Thread(target=crowd.live, args=(tier, random.Random(f"{seed} {number}")))
            for number, tier in enumerate(TIERS)
        ]
        for thread in threads:
            thread.start()
        crowd.disturb(tmp_path, random.Random(seed))
        for thread in threads:
            thread.join(60)
        assert crowd.problems == []
        assert crowd.seen["granted"] > 20, crowd.seen
        assert crowd.seen["read_failed"] + crowd.seen["copy_failed"] > 0, crowd.seen
        status = daemon.status()
        for tier in (status["dram"], *status["gpus"]):
            assert tier["used_bytes"] <= max(BUDGETS.values())
        if direct:
            assert sum(gpu["direct"]["layers"] for gpu in status["gpus"]) > 0
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log_text()
