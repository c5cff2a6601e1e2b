"""What each client has to expect: how long a pass takes, what of it is stall, which stage binds.

While a client computes, layers for it are read and copied. In the long run a pass takes as long as
the slowest of the three, and what that takes beyond the compute is stall. Clients of one model
share its reads; models share the device by weight, and none gets more than it can use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.core.cost import SECOND_NS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Load:
    """One pass of one client."""

    client: int
    model: int
    device: int  #: where the model's pack lies
    compute_ns: int
    ssd_bytes: int  #: that a pass over the model has to read, for all its clients together
    gpu: int | None = None  #: that it computes on
    copy_bytes: int = 0  #: that a pass has to copy to that, for all clients of the model there
    weight: int = 100
    tokens_per_pass: int = 1


@dataclass(frozen=True, slots=True)
class Prediction:
    """Of one pass, in steady state."""

    client: int
    compute_ns: int
    ssd_ns: int  #: at the share of the device that its model gets
    copy_ns: int
    tokens_per_pass: int

    @property
    def pass_ns(self) -> int:
        return max(self.compute_ns, self.ssd_ns, self.copy_ns)

    @property
    def stall_ns(self) -> int:
        return self.pass_ns - self.compute_ns

    @property
    def ns_per_token(self) -> int:
        return self.pass_ns // self.tokens_per_pass

    @property
    def binds(self) -> str:
        """The stage that takes longest: "compute", "ssd" or "copy"."""
        if self.pass_ns == self.compute_ns:
            return "compute"
        return "ssd" if self.pass_ns == self.ssd_ns else "copy"


def predict(
    loads: Sequence[Load], ssd: Mapping[int, int], copy: Mapping[int, int] | None = None
) -> list[Prediction]:
    """For each load in turn. ssd: bytes per second of each device that a load reads from. copy: of
    each GPU that a load copies to."""
    read = _times([_Part(load, load.device, load.ssd_bytes) for load in loads], ssd)
    copied = _times([_Part(load, load.gpu, load.copy_bytes) for load in loads], copy or {})
    return [
        Prediction(load.client, load.compute_ns, ssd_ns, copy_ns, load.tokens_per_pass)
        for load, ssd_ns, copy_ns in zip(loads, read, copied, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Part:
    """What a pass moves through one device or link."""

    load: Load
    place: int | None
    nbytes: int


def _times(parts: Sequence[_Part], bandwidths: Mapping[int, int]) -> list[int]:
    """How long each pass takes for its bytes, at the share that its model gets of the place."""
    shares: dict[tuple[int | None, int], float] = {}
    for place in {part.place: None for part in parts if part.nbytes}:
        assert place is not None
        through = [part for part in parts if part.place == place and part.nbytes]
        for model, share in _shares(through, bandwidths[place]).items():
            shares[place, model] = share
    return [
        int(part.nbytes * SECOND_NS / shares[part.place, part.load.model]) if part.nbytes else 0
        for part in parts
    ]


def _shares(parts: Sequence[_Part], bandwidth: int) -> dict[int, float]:
    """Bytes per second of each model: weighted fair shares, and what one cannot use goes to the
    others (water filling). A model that gets all it can use may have what nobody else takes."""
    weights: dict[int, int] = {}
    wanted: dict[int, float] = {}
    for part in parts:
        load = part.load
        weights[load.model] = weights.get(load.model, 0) + load.weight
        rate = part.nbytes * SECOND_NS / max(load.compute_ns, 1)
        wanted[load.model] = max(wanted.get(load.model, 0.0), rate)
    shares: dict[int, float] = {}
    left = float(bandwidth)
    while weights:
        total = sum(weights.values())
        content = [model for model in weights if wanted[model] <= left * weights[model] / total]
        if not content:
            return shares | {model: left * weights[model] / total for model in weights}
        for model in content:
            shares[model] = wanted[model]
        left -= sum(wanted[model] for model in content)
        for model in content:
            del weights[model]
    # Everybody has what it can use; a single read is faster than that.
    return {model: share + left for model, share in shares.items()}
