"""What the core is told of the link to a GPU, and what follows for clients there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.daemon.conftest import MIB, OpenedOnGpu, write_pack
from tests.daemon.gpu_daemon import gpu_status
from tierd.copy_meter import OBSERVED_BYTES, CopyMeter
from tierd.core.stack_model import GpuMeasured

if TYPE_CHECKING:
    from pathlib import Path

    from tests.daemon.gpu_daemon import Connect, Start
    from tierd.core.stack_model import StackEvent
    from tierd.gpu.worker import GpuWorker

SECOND_NS = 10**9
LAYERS, LAYER_BYTES = 8, 4 * MIB
LINK = 200 * MIB  #: bytes a second


class Worker:
    """Counts what a test says was copied."""

    def __init__(self) -> None:
        self.copied_bytes = self.busy_ns = 0

    def statistics(self) -> Any:
        return SimpleNamespace(copied_bytes=self.copied_bytes, busy_ns=self.busy_ns)


def test_the_core_hears_of_a_rate_once_in_so_many_bytes() -> None:
    told: list[StackEvent] = []
    worker = Worker()
    meter = CopyMeter(3, cast("GpuWorker", worker), told.append)
    worker.copied_bytes, worker.busy_ns = OBSERVED_BYTES - 1, SECOND_NS
    meter.copied()
    assert not told
    worker.copied_bytes += 1
    meter.copied()
    [first] = told
    assert isinstance(first, GpuMeasured)
    assert first.gpu == 3
    assert first.bytes_per_s == pytest.approx(OBSERVED_BYTES, abs=1)
    meter.copied()
    assert told == [first]
    worker.copied_bytes += 2 * OBSERVED_BYTES
    worker.busy_ns += SECOND_NS
    meter.copied()
    assert isinstance(told[1], GpuMeasured)
    assert first.bytes_per_s < told[1].bytes_per_s <= 2 * OBSERVED_BYTES


def test_what_a_pass_on_a_gpu_costs_is_predicted_from_what_its_copies_took(
    tmp_path: Path, start_daemon: Start, connect: Connect
) -> None:
    """All of the model is in DRAM, half of it on the GPU: the link binds, and nothing is read."""
    write_pack(tmp_path / "m", LAYERS, LAYER_BYTES)
    daemon = start_daemon(
        *("--pack", tmp_path / "m", "--dram", "64MiB", "--gpu", f"0={LAYERS // 2 * LAYER_BYTES}"),
        *("--gpu-device", "memfd", "--gpu-chunk", "2MiB", "--gpu-copy-bandwidth", LINK),
    )
    opened = connect(daemon, tier="gpu:0").open("m")
    assert isinstance(opened, OpenedOnGpu)
    order = list(range(LAYERS))
    opened.client.call("plan", model_id=opened.model_id, order=order)
    assert gpu_status(daemon)["link_bytes_per_s"] is None
    for layer in order * 4:
        opened.client.call("release", leases=[opened.acquire(layer)["lease"]])
    rate = gpu_status(daemon)["link_bytes_per_s"]
    assert LINK / 3 < rate < 1.1 * LINK
    [client] = daemon.ask("clients")["clients"]
    found = client["predicted"]
    assert (found["binds"], found["ssd_ns"]) == ("copy", 0)
    pack_bytes = LAYERS * LAYER_BYTES
    assert pack_bytes // 2 <= found["copy_ns"] * rate / SECOND_NS <= 1.01 * pack_bytes
    assert found["stall_ns"] == found["copy_ns"] - found["compute_ns"]
