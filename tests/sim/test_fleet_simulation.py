"""Three tiers at scale: whatever is drawn, the promises hold; a failing seed can be replayed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tierd.core.errors import CoreError
from tierd.core.model import Evict, LayerKey, ReadFailed, Refuse
from tierd.core.stack_copies import FeedCopies
from tierd.core.stack_model import Copy, Unload
from tierd.sim.__main__ import main, replay_command
from tierd.sim.errors import BrokenPromise
from tierd.sim.fleet import Fleet, Size, drawn_fleet
from tierd.sim.fleet_simulation import FleetSimulation
from tierd.sim.scenario import Device
from tierd.sim.world import World

if TYPE_CHECKING:
    from tierd.core.model import Grant, Later
    from tierd.core.stack_feed import Feed
    from tierd.sim.summaries import FleetSummary

G = 2 << 20
SMALL = Size(clients=8, models=4, gpus=2, layers=8, events=1_500)
CROWD = Size(clients=12, models=3, gpus=3, layers=6, events=3_000)


def run(fleet: Fleet, full_every: int) -> FleetSummary:
    size = fleet.size
    try:
        return FleetSimulation(fleet, full_every=full_every).run()
    except (BrokenPromise, CoreError) as error:
        command = replay_command(
            fleet.seed, scale=True, clients=size.clients, models=size.models, gpus=size.gpus,
            layers=size.layers, events=size.events, chunk_mib=size.chunk_mib, full_every=full_every,
        )  # fmt: skip
        raise AssertionError(f"{error}\nreplay: {command}") from error


@pytest.mark.parametrize("seed", [*range(6), 26, 56, 72])
def test_every_promise_of_three_tiers_holds_with_the_full_check_after_every_event(
    seed: int,
) -> None:
    run(drawn_fleet(seed, SMALL), 1)


@pytest.mark.parametrize("seed", [1000, 1001, 1046])
def test_every_promise_of_three_tiers_holds_for_a_crowd_on_small_models(seed: int) -> None:
    run(drawn_fleet(seed, CROWD), 100)


@pytest.mark.parametrize("chunk_mib", [2, 8, 32])
def test_layers_of_1_to_100_mib_share_chunks_of_any_size_while_budgets_change(
    chunk_mib: int,
) -> None:
    """Chunks larger than many layers, budgets down and up, kept leases, kills and fences."""
    sizes = replace(CROWD, chunk_mib=chunk_mib)
    summaries = [run(drawn_fleet(seed, sizes), 50) for seed in (2004, 2005, 2011)]
    assert sum(summary.budgets for summary in summaries) > 5
    assert sum(summary.kept for summary in summaries) > 0


def test_layers_of_a_drawn_fleet_are_smaller_and_larger_than_a_chunk() -> None:
    fleets = [drawn_fleet(seed, CROWD) for seed in range(20)]
    sizes = [size for fleet in fleets for model in fleet.models for size in model.layer_bytes[:-2]]
    assert min(sizes) < 2 << 20
    assert max(sizes) > 64 << 20
    assert {chunk >> 20 for fleet in fleets for chunk in fleet.chunk_bytes} == {2, 4, 8, 16, 32}


def test_every_promise_holds_at_scale() -> None:
    """200 clients, 50 models, 8 GPUs. A million events: `python -m tierd.sim --scale`."""
    faulty = Device(bandwidth=12_000_000_000, error_share=0.005, slow_share=0.01)
    direct = (True, *(False,) * 7)
    fleet = drawn_fleet(1, Size(events=15_000))
    fleet = replace(fleet, disk=faulty, link=faulty, early=True, direct=direct)
    summary = run(fleet, 1_000)
    assert summary.clients > 200
    assert summary.copies > 300
    assert min(summary.early, summary.direct) > 50
    assert summary.failures > 0


def test_disks_and_links_that_often_fail_and_stall_break_no_promise() -> None:
    bad = Device(error_share=0.2, slow_share=0.1)
    fleets = [replace(drawn_fleet(seed, SMALL), disk=bad, link=bad) for seed in (3, 4)]
    assert sum(run(fleet, 10).failures for fleet in fleets) > 20


@pytest.mark.parametrize("seed", [2, 5])
def test_copies_that_begin_with_their_reads_may_fail_stall_and_be_stopped_anywhere(
    seed: int,
) -> None:
    """Small blocks, slow disks, bad links, models that are replaced all the time."""
    fleet = replace(
        drawn_fleet(seed, SMALL),
        early=True,
        direct=(False, seed == 2),
        block_bytes=1 << 20,
        replace_ns=60_000_000,
        disk=Device(bandwidth=3_000_000_000, error_share=0.15, slow_share=0.1),
        link=Device(bandwidth=6_000_000_000, error_share=0.15, slow_share=0.1),
    )
    summary = run(fleet, 1)
    assert summary.early > 30
    assert summary.stopped > 10
    assert summary.failures > 20
    assert (summary.direct > 0) == (seed == 2)


def test_a_node_whose_gpus_read_directly_reads_into_dram_only_what_is_wanted_there() -> None:
    fleet = replace(drawn_fleet(7, SMALL), direct=(True, True))
    summary = run(fleet, 10)
    assert summary.direct > 50
    assert summary.reads > 0, "for clients of DRAM"


def test_a_slot_that_the_stack_gives_away_under_a_copy_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mistake that nothing else would show: the GPU's machine hears of a failed read before
    the copy that it feeds has ended."""
    answer = FeedCopies.answer

    def too_early(self: FeedCopies, feed: Feed, action: Grant | Later | Refuse) -> None:
        copying = feed.filling.get(action.request)
        answer(self, feed, action)
        if copying is not None and isinstance(action, Refuse):
            failed = ReadFailed(0, copying.read.slot, action.code, action.text)
            self._books.todo.append((feed.gpu, failed))

    monkeypatch.setattr(FeedCopies, "answer", too_early)
    bad = Device(bandwidth=3_000_000_000, error_share=0.2)
    fleet = replace(drawn_fleet(5, SMALL), early=True, direct=(), disk=bad)
    with pytest.raises(BrokenPromise, match=r"Unload\(.*but the slot is"):
        FleetSimulation(fleet, full_every=10_000).run()


def test_the_same_seed_gives_the_same_run() -> None:
    fleet = drawn_fleet(4, replace(CROWD, events=2_000))
    assert run(fleet, 1_000) == run(fleet, 1_000)


def test_a_node_without_gpus_is_one_tier() -> None:
    summary = run(drawn_fleet(5, replace(SMALL, gpus=0)), 10)
    assert summary.copies == 0
    assert summary.layers > 100


def test_the_command_line_runs_at_scale_and_prints_how_to_replay_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--scale", "--clients", "6", "--models", "2", "--gpus", "1", "--layers", "4"]
    options += ["--events", "400", "--full-every", "7"]
    assert main(["--seed", "2", *options]) == 0
    assert "events/s" in capsys.readouterr().out

    def broken(self: World, action: Evict) -> None:
        raise BrokenPromise(f"{action} on purpose")

    monkeypatch.setattr(World, "grant", broken)
    assert main(["--seed", "2", *options]) == 1
    printed = capsys.readouterr().err
    assert "replay: python -m tierd.sim --seed 2 --scale --clients 6 --models 2 --gpus 1" in printed
    assert "--layers 4 --events 400 --full-every 7" in printed


def test_the_world_notices_what_a_stack_must_never_do() -> None:
    """The checker is itself checked: each of these is a way to corrupt a client's data."""
    dram, gpu = World(2 * G, G), World(2 * G, G, gpu=True)
    dram.spans[0] = gpu.spans[1] = 8 * G
    copy = Copy(0, 0, 1, LayerKey(0, 0), 1, 0, G, 5, 0, 0, "demand")
    with pytest.raises(BrokenPromise, match="is copied from slot 5, which is None"):
        dram.copy_from(5, copy.key, 0)
    dram.read(replace(copy, slot=5, arena=0))
    with pytest.raises(BrokenPromise, match="is copied from slot 5"):
        dram.copy_from(5, copy.key, 0)  # not filled yet
    dram.check_source(5, copy.key, 0)
    with pytest.raises(BrokenPromise, match="is copied from slot 5"):
        dram.check_source(5, LayerKey(0, 1), 0)
    with pytest.raises(BrokenPromise, match="but the slot is"):
        dram.evict(Evict(5, 1, copy.key))  # something still writes there
    dram.read_done(5)
    dram.copy_from(5, copy.key, 0)
    with pytest.raises(BrokenPromise, match="but the slot is"):
        dram.evict(Evict(5, 1, copy.key))
    dram.copied(5)
    dram.evict(Evict(5, 1, copy.key))
    gpu.read(copy)
    gpu.read_done(0)
    gpu.slots[0].leases.add(1)
    gpu.leases[1] = 0
    gpu.fence(1, holder=7)
    with pytest.raises(BrokenPromise, match="but the slot is"):
        gpu.evict(Unload(0, 0, 1, copy.key))
    gpu.holder_gone(7)
    gpu.evict(Unload(0, 0, 1, copy.key))
