"""The steady state of a node, against what arithmetic says it must be."""

from __future__ import annotations

import pytest

from tierd.sim.errors import DoesNotFit
from tierd.sim.steady import BLOCK_BYTES, Node, SteadyState, Work, steady_state

MIB = 1 << 20
LAYER = 32 * MIB
LAYERS = 24
PACK = LAYER * LAYERS
GB = 10**9


def run(share: float, compute_ms: int, *, bandwidth: int = 2 * GB, clients: int = 1) -> SteadyState:
    """share: of the model that fits into DRAM. compute_ms: of a pass."""
    work = Work(
        (LAYER,) * LAYERS,
        tuple(range(LAYERS)),
        (compute_ms * 1_000_000 // LAYERS,) * LAYERS,
        clients,
    )
    return steady_state(Node(int(PACK * share), bandwidth), work)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("compute_ms", [20, 100, 1000])
def test_a_pass_takes_as_long_as_its_slowest_stage(share: float, compute_ms: int) -> None:
    found = run(share, compute_ms)
    assert found.settled
    missing = PACK - PACK * share
    assert missing <= found.ssd_bytes <= missing + 3 * LAYER
    slowest_ns = max(found.compute_ns, found.ssd_bytes * GB // (2 * GB))
    assert slowest_ns <= found.pass_ns * 1.001
    assert found.pass_ns <= 1.1 * slowest_ns
    assert found.stall_ns == pytest.approx(found.pass_ns - found.compute_ns, rel=0.01, abs=1000)


def test_a_model_that_fits_reads_and_stalls_for_nothing() -> None:
    found = run(1.1, 100)
    assert (found.ssd_bytes, found.ssd_share, found.stall_ns) == (0, 0.0, 0)
    assert found.pass_ns == found.compute_ns


def test_clients_of_one_model_share_the_reads_of_a_pass() -> None:
    one, four = run(0.5, 20), run(0.5, 20, clients=4)
    assert four.ssd_bytes <= 1.1 * one.ssd_bytes / 4
    assert four.pass_ns <= 1.2 * one.pass_ns


def test_the_same_question_has_the_same_answer() -> None:
    assert run(0.4, 150, clients=2) == run(0.4, 150, clients=2)


def test_a_budget_below_what_the_clients_need_is_refused_with_the_numbers() -> None:
    with pytest.raises(DoesNotFit, match=f"needs {LAYER} bytes"):
        run(0.03, 10)


def test_a_tied_layer_that_follows_itself_is_kept_and_not_asked_for_again() -> None:
    work = Work((LAYER,) * 4, (0, 1, 2, 3, 0), (0, 10**6, 10**6, 10**6, 10**6))
    found = steady_state(Node(3 * LAYER, GB), work)
    assert found.settled
    assert found.ssd_bytes <= 3 * LAYER


def three_tiers(dram_share: float, gpu_share: float, copy: int) -> SteadyState:
    work = Work((LAYER,) * LAYERS, tuple(range(LAYERS)), (10**5,) * LAYERS)
    node = Node(
        int(PACK * dram_share), 2 * GB, gpu_bytes=int(PACK * gpu_share), copy_bytes_per_s=copy
    )
    return steady_state(node, work)


def test_what_does_not_stay_on_the_gpu_is_copied_in_every_pass() -> None:
    found = three_tiers(1.1, 0.5, 10 * GB)
    assert found.settled
    assert found.ssd_bytes == 0
    assert PACK // 2 <= found.copy_bytes <= PACK // 2 + 3 * LAYER
    assert found.pass_ns == pytest.approx(found.copy_bytes / 10, rel=0.1)
    assert found.copy_share > 0.9


def test_what_lives_on_the_gpu_need_not_be_in_dram() -> None:
    found = three_tiers(0.5, 0.5, 100 * GB)
    assert found.settled
    assert found.ssd_bytes <= 6 * LAYER  # the moving room of both tiers


def test_a_layer_reaches_a_gpu_one_block_after_its_read_where_both_take_as_long() -> None:
    """With one slot in DRAM and two on the GPU nothing is ahead: a pass is the sum of what each
    layer takes on its way, and that is its read and a block, not its read and its copy."""
    block_ns = BLOCK_BYTES * GB // (2 * GB)
    layer_ns = LAYER * GB // (2 * GB)
    node = Node(LAYER, 2 * GB, gpu_bytes=2 * LAYER, copy_bytes_per_s=2 * GB)
    found = steady_state(node, Work((LAYER,) * 8, tuple(range(8)), (0,) * 8))
    assert found.copy_bytes == found.ssd_bytes == pytest.approx(8 * LAYER, rel=0.01)
    assert 8 * layer_ns <= found.pass_ns <= 8 * (layer_ns + 2 * block_ns)


@pytest.mark.parametrize("direct", [False, True], ids=["through-dram", "direct"])
def test_a_gpu_that_reads_directly_reads_what_neither_tier_has(direct: bool) -> None:
    node = Node(
        PACK // 4, 2 * GB, gpu_bytes=PACK // 2, copy_bytes_per_s=8 * GB, direct=direct
    )  # fmt: skip
    found = steady_state(node, Work((LAYER,) * LAYERS, tuple(range(LAYERS)), (0,) * LAYERS))
    if direct:
        assert found.copy_bytes == 0, "nobody brings anything into DRAM"
        assert found.ssd_bytes == pytest.approx(PACK // 2, abs=3 * LAYER)
    else:
        assert found.ssd_bytes == pytest.approx(PACK // 4, abs=5 * LAYER)
