"""Where layers stay with three tiers: on the GPU, else in DRAM, and in both only on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.daemon.conftest import PackOnDisk, RunningDaemon, write_pack
from tests.e2e.gpu_client import GpuClient, GpuModel, damaged_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 1 << 20
LAYERS, LAYER_BYTES = 16, 2 * MIB
PASSES = 4


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> PackOnDisk:
    return write_pack(tmp_path_factory.mktemp("placed") / "models" / "m", LAYERS, LAYER_BYTES)


@pytest.fixture
def connect() -> Iterator[Callable[[RunningDaemon, str], GpuModel]]:
    clients: list[GpuClient] = []

    def opened(daemon: RunningDaemon, tier: str) -> GpuModel:
        clients.append(GpuClient(daemon.socket))
        clients[-1].greet(tier)
        model = clients[-1].open_gpu("m")
        model.plan(LAYERS)
        return model

    yield opened
    for client in clients:
        client.close()


def start(
    pack: PackOnDisk, folder: Path, dram_layers: int, gpu_layers: dict[int, int]
) -> RunningDaemon:
    flags = ["--models", str(pack.path.parent), "--dram", str(dram_layers * LAYER_BYTES)]
    flags += ["--gpu-device", "memfd", "--gpu-chunk", str(LAYER_BYTES)]
    for number, layers in gpu_layers.items():
        flags += ["--gpu", f"{number}={layers * LAYER_BYTES}"]
    return RunningDaemon(str(folder / "tierd.sock"), folder / "log", flags).wait_ready()


def walk(model: GpuModel, pack: PackOnDisk) -> None:
    for layer, record in enumerate(pack.index.layers):
        assert damaged_blocks(model.read(layer), record) == [], f"layer {layer}"


def test_what_stays_on_the_gpu_leaves_room_in_dram_for_the_rest(
    pack: PackOnDisk, tmp_path: Path, connect: Callable[[RunningDaemon, str], GpuModel]
) -> None:
    # DRAM alone would read 16 - 10 layers a pass again, the GPU alone would be sent 16 - 8.
    dram_layers, gpu_layers = 10, 8
    daemon = start(pack, tmp_path, dram_layers, {0: gpu_layers})
    try:
        model = connect(daemon, "gpu:0")
        for _ in range(PASSES):
            walk(model, pack)
        before = daemon.status()
        for _ in range(PASSES):
            walk(model, pack)
        after = daemon.status()
    finally:
        daemon.kill()
    read = (after["ssd"]["read_bytes"] - before["ssd"]["read_bytes"]) / LAYER_BYTES / PASSES
    copied = after["gpus"][0]["copied_bytes"] - before["gpus"][0]["copied_bytes"]
    # Two layers pass through each tier at once; the others stay where they are.
    assert copied / LAYER_BYTES / PASSES <= LAYERS - gpu_layers + 3
    assert read < (LAYERS - dram_layers) / 2, "DRAM keeps what the GPU has anyway"


def test_two_gpus_get_a_layer_from_one_read_and_keep_their_own_budgets(
    pack: PackOnDisk, tmp_path: Path, connect: Callable[[RunningDaemon, str], GpuModel]
) -> None:
    daemon = start(pack, tmp_path, LAYERS + 1, {2: LAYERS, 5: 4})
    try:
        large, small = connect(daemon, "gpu:2"), connect(daemon, "gpu:5")
        for _ in range(2):
            walk(large, pack)
            walk(small, pack)
        status = daemon.status()
    finally:
        daemon.kill()
    assert status["ssd"]["read_bytes"] == LAYERS * LAYER_BYTES
    gpus = {gpu["tier"]: gpu for gpu in status["gpus"]}
    assert set(gpus) == {"gpu:2", "gpu:5"}, "by the numbers that the operator gave"
    assert gpus["gpu:2"]["copied_bytes"] == LAYERS * LAYER_BYTES
    assert gpus["gpu:5"]["copied_bytes"] > LAYERS * LAYER_BYTES
    for tier, layers in (("gpu:2", LAYERS), ("gpu:5", 4)):
        assert gpus[tier]["peak_bytes"] <= gpus[tier]["budget_bytes"] == layers * LAYER_BYTES
