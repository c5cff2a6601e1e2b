"""Tiers by name and by arena."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tierd.config import load
from tierd.errors import TierUnavailable
from tierd.tiers import Tiers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVE = ["--models", "/packs", "--socket", "/s"]


def tiers_of(*flags: str) -> Tiers:
    return Tiers(load([*SERVE, *flags], {}), 1, asyncio.get_running_loop())


@pytest.fixture
async def tiers() -> AsyncIterator[Tiers]:
    tiers = tiers_of("--gpu", "3=64MiB", "--gpu", "0=32MiB", "--gpu-device", "memfd")
    yield tiers
    tiers.stop()
    await asyncio.get_running_loop().run_in_executor(None, tiers.close)
    tiers.close_slots()


async def test_gpus_are_counted_as_they_were_given_and_found_by_their_numbers(
    tiers: Tiers,
) -> None:
    assert [gpu.name for gpu in tiers.gpus] == ["gpu:3", "gpu:0"]
    assert [gpu.index for gpu in tiers.gpus] == [0, 1]
    assert tiers.find("gpu:0") is tiers.gpus[1]
    assert tiers.find("dram") is None
    assert tiers.of_arena((1 << 20) + 5) is tiers.gpus[0]
    assert tiers.of_arena(2 << 20) is tiers.gpus[1]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("gpu:1", "gpu:1"),
        ("gpu", "gpu"),
        ("GPU:0", "'GPU:0'"),
        ("gpu:0\x1b[2J", r"'gpu:0\x1b[2J'"),
        ("", "''"),
        ("x" * 99, repr("x" * 40)),
    ],
)
async def test_a_name_that_is_none_is_refused_with_those_that_are(
    tiers: Tiers, name: str, shown: str
) -> None:
    with pytest.raises(TierUnavailable) as caught:
        tiers.find(name)
    assert str(caught.value) == f"there is no tier {shown} here; there are dram, gpu:3, gpu:0"


async def test_a_gpu_that_opens_is_neither_ready_nor_refused_and_its_machine_has_its_chunks(
    tiers: Tiers,
) -> None:
    gpu = tiers.gpus[0]
    assert not gpu.check_ready()
    assert gpu.core_config.granule_bytes == gpu.device.chunk_bytes == 2 << 20
    assert gpu.core_config.budget_bytes == 64 << 20


async def test_without_gpus_there_is_nothing_to_watch_or_to_close() -> None:
    tiers = tiers_of()
    assert (tiers.gpus, tiers.registrar) == ((), None)
    assert (tiers.alive(), tiers.silent()) == (True, {})
    tiers.stop()
    tiers.close()
    with pytest.raises(TierUnavailable, match=r"there is no tier gpu:0 here; there are dram$"):
        tiers.find("gpu:0")
