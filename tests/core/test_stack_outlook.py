"""What is predicted for clients of GPUs, against a simulated node."""

from __future__ import annotations

import pytest

from tests.core.stack_by_hand import FIRST, feed, key, of, settle, stack_of
from tierd.core.errors import IllegalEvent
from tierd.core.model import Acquire, ClientJoined, Grant, Plan, Release
from tierd.core.prediction import predict
from tierd.core.stack import TierStack
from tierd.core.stack_model import GpuMeasured
from tierd.sim.steady import Node, SteadyRun, Work

GB = 10**9
LAYER = 32 << 20
LAYERS = 20


def run(
    dram: int, gpu: int, compute_ms: int, *, copy: int = 6, direct: bool = False
) -> tuple[float, str]:
    """Predicted by simulated length of a pass, and what binds. dram, gpu: layers."""
    node = Node(
        dram * LAYER, 4 * GB, gpu_bytes=gpu * LAYER, copy_bytes_per_s=copy * GB, direct=direct
    )
    steps = (compute_ms * 1_000_000,) * LAYERS
    simulated = SteadyRun(node, Work((LAYER,) * LAYERS, tuple(range(LAYERS)), steps))
    state = simulated.run()
    stack = simulated.tiers
    assert isinstance(stack, TierStack)
    stack.handle(GpuMeasured(0, 0, node.copy_bytes_per_s))
    [found] = predict(stack.loads(), {0: node.ssd_bytes_per_s}, stack.copy_bandwidths())
    return found.pass_ns / state.pass_ns, found.binds


@pytest.mark.parametrize(
    ("dram", "gpu", "compute_ms", "copy", "binds"),
    [
        (3, 2, 1, 6, "ssd"),
        (10, 8, 1, 12, "ssd"),
        (22, 3, 1, 3, "copy"),
        (22, 8, 20, 3, "compute"),
        (10, 3, 5, 3, "copy"),
        (3, 21, 5, 6, "compute"),
        (10, 16, 5, 6, "compute"),
    ],
)
def test_a_pass_on_a_gpu_takes_as_long_as_its_slowest_stage(
    dram: int, gpu: int, compute_ms: int, copy: int, binds: str
) -> None:
    ratio, found = run(dram, gpu, compute_ms, copy=copy)
    assert ratio == pytest.approx(1, abs=0.15)
    assert found == binds


@pytest.mark.parametrize(("dram", "gpu", "compute_ms"), [(3, 3, 1), (3, 10, 5), (3, 21, 5)])
def test_a_pass_on_a_gpu_that_reads_directly_is_predicted_too(
    dram: int, gpu: int, compute_ms: int
) -> None:
    ratio, found = run(dram, gpu, compute_ms, direct=True)
    assert ratio == pytest.approx(1, abs=0.15)
    assert found == ("compute" if gpu == 21 else "ssd")


def passes(stack: TierStack, client: int, layers: int, count: int) -> None:
    """The client computes one millisecond with each layer."""
    settle(stack, feed(stack, Plan(0, client, 1, 0, tuple(range(layers)))))
    for number in range(count * layers):
        at_ns = (number + 1) * 1_000_000
        asked = feed(stack, Acquire(at_ns, client, number + 2, key(number % layers)))
        [lease] = [grant.lease for grant in of(Grant, settle(stack, asked, at_ns))]
        settle(stack, feed(stack, Release(at_ns, client, lease)), at_ns)


def test_clients_of_both_tiers_have_one_load_each_and_pseudo_clients_none() -> None:
    stack = stack_of(4, 4, (1,) * 8)
    feed(stack, ClientJoined(0, 1))
    passes(stack, 1, 8, 4)
    passes(stack, FIRST, 8, 8)
    loads = {load.client: load for load in stack.loads()}
    assert set(loads) == {1, FIRST}
    assert (loads[1].gpu, loads[1].copy_bytes) == (None, 0)
    assert loads[FIRST].gpu == 0
    assert loads[FIRST].copy_bytes >= loads[FIRST].ssd_bytes > 0


def test_a_model_that_fits_on_its_gpu_moves_nothing() -> None:
    stack = stack_of(3, 8, (1,) * 8)
    passes(stack, FIRST, 8, 5)
    [load] = stack.loads()
    assert (load.ssd_bytes, load.copy_bytes) == (0, 0)


def test_the_rate_of_a_gpu_is_what_was_measured_last() -> None:
    stack = stack_of(4, 4, (1,), gpus=2)
    assert stack.copy_bandwidths() == {}
    assert not feed(stack, GpuMeasured(1, 1, 5), GpuMeasured(2, 1, 7))
    assert stack.copy_bandwidths() == {1: 7}


@pytest.mark.parametrize(
    ("event", "text"),
    [(GpuMeasured(0, 1, 5), "no GPU 1"), (GpuMeasured(0, 0, 0), "no GPU copies like this")],
)
def test_figures_that_no_gpu_has_are_illegal(event: GpuMeasured, text: str) -> None:
    stack = stack_of(4, 4, (1,))
    with pytest.raises(IllegalEvent, match=text):
        stack.handle(event)
    assert not stack.measured
