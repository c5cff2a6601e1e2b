"""What a run consists of, drawn from a seed, or written by a test."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from tierd.core.model import AdoptedSlot, LayerKey
from tierd.sim.virtual_client import Profile

PAGE = 4096


@dataclass(frozen=True, slots=True)
class Device:
    """A disk that transfers one byte after the other, and a system that takes memory back."""

    bandwidth: int = 2_000_000_000  #: bytes a second
    latency_ns: int = 100_000
    error_share: float = 0.0  #: reads that fail
    slow_share: float = 0.0  #: reads that take `slow_factor` times as long
    slow_factor: int = 20
    discard_ns: int = 200_000

    def worst_read_ns(self, nbytes: int) -> int:
        factor = self.slow_factor if self.slow_share else 1
        return (self.latency_ns + nbytes * 1_000_000_000 // self.bandwidth) * factor


@dataclass(frozen=True, slots=True)
class Model:
    number: int
    arena: int
    layer_bytes: tuple[int, ...]
    added_ns: int = 0
    removed_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    budget_bytes: int
    models: tuple[Model, ...]
    clients: tuple[Profile, ...]
    seed: int = 0
    granule_bytes: int = 2 << 20
    reads_in_flight: int = 2
    spans: tuple[int, ...] = ()  #: bytes of each arena; default: one of 64 budgets
    warm_share: float = 1.0  #: of the budget, in arena 0
    device: Device = field(default_factory=Device)
    adopted: tuple[AdoptedSlot, ...] = ()
    holders_ns: int = 20_000_000  #: when the holders of adopted slots are gone
    slot_limit: int = 1 << 30  #: slots that may exist at once
    budgets: tuple[tuple[int, int], ...] = ()  #: when an operator wants another one, and its bytes

    @property
    def arena_spans(self) -> tuple[int, ...]:
        return self.spans or (64 * self.budget_bytes,)


def cycle(layers: int, capacity: int, *, layer_bytes: int = 2 << 20, **profile: object) -> Scenario:
    """One client on a cycle of equal layers, with room for `capacity` of them."""
    model = Model(0, 0, (layer_bytes,) * layers)
    client = Profile(0, tuple(range(layers)), **profile)  # type: ignore[arg-type]
    return Scenario(capacity * layer_bytes, (model,), (client,))


def drawn(seed: int, *, clients: int | None = None, steps: int | None = None) -> Scenario:
    """A scenario with everything that may go wrong, the same for the same arguments."""
    rng = random.Random(seed)
    granule = rng.choice([PAGE, 16 * PAGE, 16 * PAGE, 512 * PAGE])
    arenas = rng.choice([1, 1, 2])
    models = tuple(_model(rng, number, granule, arenas) for number in range(rng.randint(1, 3)))
    count = clients if clients is not None else rng.randint(1, 6)
    profiles = tuple(_profile(rng, rng.choice(models), steps) for _ in range(count))
    budget = _budget(rng, models, profiles, granule) * granule
    spans = tuple(budget * rng.choice([16, 64]) for _ in range(arenas))
    if rng.random() < 0.1:
        spans = tuple(budget + granule * rng.randint(0, 8) for _ in range(arenas))
    device = Device(
        bandwidth=rng.choice([100_000_000, 2_000_000_000]),
        latency_ns=rng.choice([10_000, 1_000_000]),
        error_share=rng.choice([0, 0, 0.05]),
        slow_share=rng.choice([0, 0, 0.05]),
        discard_ns=rng.choice([0, 200_000, 5_000_000]),
    )
    adopted = _adopted(rng, models, budget, spans[0], granule) if rng.random() < 0.25 else ()
    scenario = Scenario(
        budget,
        models,
        profiles,
        seed,
        granule,
        rng.randint(1, 4),
        spans,
        0.0 if adopted else rng.random(),
        device,
        adopted,
        rng.choice([0, 20_000_000, 200_000_000]),
        _slot_limit(rng, count, adopted),
    )
    return _kept_and_changed(random.Random(f"kept {seed}"), scenario)


def _kept_and_changed(rng: random.Random, scenario: Scenario) -> Scenario:
    """Often some clients keep their leases, and the budget changes; drawn apart from the rest."""
    if rng.random() < 0.5:
        clients = tuple(
            replace(client, keeps=rng.random() < 0.7, answer_ns=rng.randint(0, 60_000_000))
            for client in scenario.clients
        )
        scenario = replace(scenario, clients=clients)
    if rng.random() < 0.5:
        budgets = sorted(
            (
                rng.randint(0, 150_000_000),
                scenario.budget_bytes * rng.randint(10, 130) // 100 // scenario.granule_bytes
                * scenario.granule_bytes,
            )
            for _ in range(rng.randint(1, 6))
        )  # fmt: skip
        scenario = replace(scenario, budgets=tuple(budgets))
    return scenario


def _slot_limit(rng: random.Random, clients: int, adopted: tuple[AdoptedSlot, ...]) -> int:
    """Often as few slots as there are clients and adopted slots, or a few more."""
    least = max((slot.slot + 1 for slot in adopted), default=0) + clients
    return rng.choice([1 << 30, least, least + rng.randint(1, 6)])


def _model(rng: random.Random, number: int, granule: int, arenas: int) -> Model:
    count = rng.randint(1, 12)
    size = max(granule * rng.randint(1, 6) - PAGE * rng.randint(0, granule // PAGE - 1), PAGE)
    kind = rng.choice(["equal", "decoder", "mixed"])
    if kind == "equal":
        layer_bytes = [size] * count
    elif kind == "decoder":
        embedding = size * rng.randint(1, 4)
        layer_bytes = [embedding, *[size] * count, PAGE, embedding]
    else:
        layer_bytes = [PAGE * rng.randint(1, 4 * granule // PAGE) for _ in range(count)]
    return Model(
        number,
        rng.randrange(arenas),
        tuple(layer_bytes),
        rng.choice([0, 0, 0, 5_000_000]),
        rng.randint(10_000_000, 200_000_000) if rng.random() < 0.15 else None,
    )


def _profile(rng: random.Random, model: Model, steps: int | None) -> Profile:
    layers = range(len(model.layer_bytes))
    kind = rng.choice(["cycle", "cycle", "cycle", "tied", "shuffled", "part"])
    order = list(layers)
    if kind == "tied":
        order.append(0)
    elif kind == "shuffled":
        rng.shuffle(order)
    elif kind == "part":
        order = rng.sample(order, rng.randint(1, len(order)))
    odd = rng.random() < 0.4
    return Profile(
        model.number,
        tuple(order),
        kind="cyclic" if rng.random() < 0.85 else "once",
        lookahead=rng.choice([0, 1, 1, 2, 4]),
        steps=steps if steps is not None else rng.randint(5, 60),
        compute_ns=rng.choice([0, 100_000, 3_000_000, 30_000_000]),
        start_ns=model.added_ns + rng.choice([0, rng.randint(0, 50_000_000)]),
        planless=rng.random() < 0.1,
        releases_late=rng.random() < 0.25,
        hoards_after=rng.randint(0, 5) if odd and rng.random() < 0.3 else None,
        dies_ns=rng.randint(0, 150_000_000) if odd and rng.random() < 0.4 else None,
        sleeps_after=rng.randint(0, 10) if odd and rng.random() < 0.3 else None,
        stray_share=0.1 if odd and rng.random() < 0.3 else 0.0,
        skip_share=0.1 if odd and rng.random() < 0.3 else 0.0,
        pause_share=0.03 if odd and rng.random() < 0.3 else 0.0,
        replan_share=0.05 if odd and rng.random() < 0.3 else 0.0,
        second_lease_share=0.1 if odd and rng.random() < 0.3 else 0.0,
    )


def _budget(
    rng: random.Random, models: tuple[Model, ...], profiles: tuple[Profile, ...], granule: int
) -> int:
    """Granules: exactly what admission needs, a little less or more, or up to everything."""

    def charge(nbytes: int) -> int:
        return -(-nbytes // granule)

    least = sum(
        max(charge(models[profile.model].layer_bytes[layer]) for layer in profile.order)
        for profile in profiles
    )
    total = sum(charge(nbytes) for model in models for nbytes in model.layer_bytes)
    kind = rng.choice(["least", "less", "little", "part", "part", "all"])
    if kind == "least":
        return least
    if kind == "less":
        return max(least - rng.randint(1, 4), 1)
    if kind == "little":
        return least + rng.randint(1, 6)
    if kind == "part":
        return max(least, total * rng.randint(20, 90) // 100)
    return least + total


def _adopted(
    rng: random.Random, models: tuple[Model, ...], budget: int, span: int, granule: int
) -> tuple[AdoptedSlot, ...]:
    """Slots of an earlier daemon in arena 0, one behind the other with gaps, some of them held."""
    found: list[AdoptedSlot] = []
    offset = 0
    allowed = min(budget * rng.choice([1, 1, 2]), span)
    for number in range(rng.randint(1, 8)):
        model = rng.choice(models)
        layer = rng.randrange(len(model.layer_bytes))
        nbytes = model.layer_bytes[layer]
        offset = -(-offset // granule) * granule + granule * rng.choice([0, 0, 1, 3])
        if offset + nbytes > allowed:
            break
        known = rng.random() < 0.8 and model.arena == 0 and model.added_ns == 0
        holders = tuple(sorted(rng.sample(range(100, 104), rng.choice([0, 0, 1, 2]))))
        key = LayerKey(model.number, layer) if known else None
        found.append(AdoptedSlot(number * 2, 0, offset, nbytes, number + 10, key, holders))
        offset += nbytes
    return tuple(found)
