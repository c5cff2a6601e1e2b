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
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Load:
    """One pass of one client."""

    client: int
    model: int
    device: int  #: where the model's pack lies
    compute_ns: int
    ssd_bytes: int  #: that a pass over the model has to read, for all its clients together
    copy_bytes: int = 0  #: from DRAM to this client's GPU
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
    loads: Sequence[Load], ssd: dict[int, int], copy_bytes_per_s: int | None = None
) -> list[Prediction]:
    """For each load in turn. ssd: bytes per second of each device that a load names.

    copy_bytes_per_s: of each GPU; clients that copy are taken to have one each.
    """
    shares: dict[int, float] = {}
    for device, bandwidth in ssd.items():
        shares |= _shares([load for load in loads if load.device == device], bandwidth)
    return [
        Prediction(
            load.client,
            load.compute_ns,
            _ns(load.ssd_bytes, shares[load.model]) if load.ssd_bytes else 0,
            _ns(load.copy_bytes, copy_bytes_per_s) if copy_bytes_per_s else 0,
            load.tokens_per_pass,
        )
        for load in loads
    ]


def _ns(nbytes: int, bytes_per_s: float) -> int:
    return int(nbytes * SECOND_NS / bytes_per_s)


def _shares(loads: Sequence[Load], bandwidth: int) -> dict[int, float]:
    """Bytes per second of each model: weighted fair shares, and what one cannot use goes to the
    others (water filling). A model that gets all it can use may have what nobody else takes."""
    weights: dict[int, int] = {}
    wanted: dict[int, float] = {}
    for load in loads:
        if load.ssd_bytes:
            weights[load.model] = weights.get(load.model, 0) + load.weight
            rate = load.ssd_bytes * SECOND_NS / max(load.compute_ns, 1)
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
