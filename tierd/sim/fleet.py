"""A node at scale, drawn from a seed: models, GPUs, and clients that come and go all the time.

Layers have 1 to 100 MiB, chunks of GPUs 2 to 32 MiB: on some GPUs most layers share a chunk.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.sim.scenario import PAGE, Device, Model
from tierd.sim.virtual_client import Profile

if TYPE_CHECKING:
    from collections.abc import Sequence

GRANULE = 2 << 20  #: of DRAM
MIB = 1 << 20
CHUNKS = (2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB)
LARGEST = 100 * MIB
ANSWER_NS = 60_000_000  #: of clients that keep leases, at most


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is of what. `events`: after so many the clients leave, and the run ends."""

    clients: int = 200
    models: int = 50
    gpus: int = 8
    layers: int = 48  #: of the longest model
    events: int = 1_000_000
    chunk_mib: int = 0  #: of every GPU; 0: drawn for each


@dataclass(frozen=True, slots=True)
class Fleet:
    """What a run at scale consists of. Models are replaced by others of the same sizes at times."""

    seed: int
    size: Size
    models: tuple[Model, ...]
    placed: tuple[tuple[int, ...], ...]  #: by GPU: numbers of models
    dram_bytes: int
    gpu_bytes: tuple[int, ...]
    disk: Device
    link: Device  #: from DRAM to each GPU
    reads_in_flight: int
    copies_in_flight: int
    chunk_bytes: tuple[int, ...]  #: by GPU
    early: bool = False  #: copies start while their layer is read
    direct: tuple[bool, ...] = ()  #: by GPU: it reads past DRAM; (): none does
    block_bytes: int = 4 * MIB  #: what is verified and copied at once
    fence_ns: int = 50_000_000  #: from the end of a GPU's client to that of its context
    replace_ns: int = 2_000_000_000  #: on average, from one replaced model to the next

    def granule_bytes(self, tier: int | None) -> int:
        """Of a GPU, or DRAM."""
        return GRANULE if tier is None else self.chunk_bytes[tier]

    def profile(self, rng: random.Random, now_ns: int) -> Profile:
        """The next client that comes; `model` is the place of one in `models`."""
        gpu = rng.randrange(self.size.gpus) if self.size.gpus and rng.random() < 0.8 else None
        models = range(len(self.models)) if gpu is None else self.placed[gpu]
        model = rng.choice(models)
        order = list(range(len(self.models[model].layer_bytes)))
        kind = rng.choices(["cyclic", "once", "open"], [8, 1, 2])[0]
        if kind == "cyclic" and rng.random() < 0.1:
            rng.shuffle(order)
        if kind == "open":
            order = order[: max(len(order) // 2, 1)]
        odd = rng.choice(["", "", "", "", "hoards", "sleeps", "dies", "strays", "pauses", "late"])
        early = odd in ("hoards", "sleeps", "dies")
        return Profile(
            model,
            tuple(order),
            kind=kind,
            lookahead=rng.choice([0, 1, 1, 2, 4]),
            steps=rng.randint(1, 8) * len(order),
            compute_ns=rng.choice([200_000, 1_000_000, 5_000_000, 20_000_000]),
            planless=rng.random() < 0.05,
            releases_late=odd == "late",
            hoards_after=rng.randint(0, 20) if odd == "hoards" else None,
            sleeps_after=rng.randint(0, 20) if odd == "sleeps" else None,
            dies_ns=rng.randint(1, 3_000_000_000) if early else None,
            stray_share=0.05 if odd == "strays" else 0.0,
            skip_share=0.05 if odd == "strays" else 0.0,
            replan_share=0.01 if odd == "strays" else 0.0,
            second_lease_share=0.05 if odd == "strays" else 0.0,
            pause_share=0.03 if odd == "pauses" else 0.0,
            hint_share=0.7 if kind == "open" else 0.0,
            tokens_per_pass=rng.choice([1, 1, 8]),
            weight=rng.choice([100, 100, 100, 20, 400]),
            keeps=kind == "cyclic" and rng.random() < 0.6,
            answer_ns=rng.randint(0, ANSWER_NS),
            start_ns=now_ns,
            gpu=gpu,
        )


def drawn_fleet(seed: int, size: Size | None = None) -> Fleet:
    """The same for the same arguments; everything may go wrong in it."""
    size = size or Size()
    rng = random.Random(f"fleet {seed}")
    models = tuple(_model(rng, number, size.layers) for number in range(size.models))
    placed = [
        tuple(sorted(rng.sample(range(size.models), min(6, size.models)))) for _ in range(size.gpus)
    ]
    chunks = tuple(size.chunk_mib * MIB or rng.choice(CHUNKS) for _ in range(size.gpus))
    on_gpu = max(1, size.clients * 4 // 5 // max(size.gpus, 1))
    feeds = sum(len(numbers) for numbers in placed)
    largest = _largest(models, GRANULE)
    dram_least = largest * (size.clients // 5 + feeds + 2)
    dram = max(dram_least, _charges(models, GRANULE) * rng.choice([20, 40, 60, 120]) // 100)
    gpus = []
    for numbers, chunk in zip(placed, chunks, strict=True):
        mine = [models[number] for number in numbers]
        least = _largest(models, chunk) * (on_gpu + 2)
        part = _charges(mine, chunk) * rng.choice([15, 40, 110, 250]) // 100
        gpus.append(max(least, part) * chunk)
    if rng.random() < 0.3:  # too little for all of them at once
        dram = max(largest, dram_least // 2)
    return Fleet(
        seed,
        size,
        models,
        tuple(placed),
        dram * GRANULE,
        tuple(gpus),
        Device(
            bandwidth=rng.choice([3_000_000_000, 12_000_000_000, 100_000_000_000]),
            error_share=rng.choice([0, 0.002]),
            slow_share=rng.choice([0, 0.01]),
        ),
        Device(
            bandwidth=rng.choice([12_000_000_000, 50_000_000_000]),
            latency_ns=20_000,
            error_share=rng.choice([0, 0.002]),
            slow_share=rng.choice([0, 0.01]),
        ),
        rng.choice([2, 4, 8]),
        rng.choice([1, 2, 3]),
        chunks,
        early=rng.random() < 0.8,
        direct=tuple(rng.random() < 0.25 for _ in range(size.gpus)),
        block_bytes=rng.choice([4, 16, 32]) * MIB,
    )


def _largest(models: Sequence[Model], granule: int) -> int:
    """The granules of the largest layer."""
    return max(-(-nbytes // granule) for model in models for nbytes in model.layer_bytes)


def _charges(models: Sequence[Model], granule: int) -> int:
    """The granules of all layers."""
    return sum(-(-nbytes // granule) for model in models for nbytes in model.layer_bytes)


def _model(rng: random.Random, number: int, layers: int) -> Model:
    """One with equal layers and larger ends, or a mixed one."""
    count = rng.randint(max(layers // 2, 1), layers)
    if rng.random() < 0.3:
        sizes = tuple(_layer(rng, LARGEST) for _ in range(count + 2))
        return Model(number, 0, (*sizes, PAGE))
    size = _layer(rng, rng.choice([LARGEST, LARGEST // 8]))
    embedding = min(size * rng.randint(1, 3), LARGEST)
    return Model(number, 0, (embedding, *[size] * count, PAGE, embedding))


def _layer(rng: random.Random, largest: int) -> int:
    return PAGE * rng.randint(MIB // PAGE, largest // PAGE)
