"""`tierctl predict`: seconds per token of a model on a machine that one does not have.

The real scheduler runs on a model of that machine up to its steady state (`tierd.sim.steady`), from
sizes, bandwidths and the compute time alone. Of a pack nothing but the index is read.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.sim.errors import DoesNotFit
from tierd.sim.steady import Node, SteadyState, Work, steady_state
from tierd_layouts.container import open_pack
from tierd_layouts.records import PAGE_BYTES
from tierd_tools.checkpoint import CONFIG, read_config
from tierd_tools.errors import BadSetting, NotServable
from tierd_tools.quantities import duration, size

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tierd_layouts.index import PackIndex

SECOND_NS = 1_000_000_000
USUAL_COPY = 25_000_000_000  #: bytes a second of pinned memory over PCIe 4.0 x16
#: Of the time; a stage that is busy for more binds, whatever is between two of its transfers.
BUSY = 0.9
MOST_LAYERS = 100_000  #: of all clients together: they take a minute to simulate


@dataclass(frozen=True, slots=True)
class Model:
    """What a pass asks for: layer sizes, the order of use, and what each step's compute is in
    proportion to. `notes`: what of the model this leaves out."""

    layer_bytes: tuple[int, ...]
    order: tuple[int, ...]
    weights: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(self.layer_bytes)


@dataclass(frozen=True, slots=True)
class Report:
    """Of one client; bytes and times are per token."""

    seconds_per_token: float
    tokens_per_second: float  #: of all clients together
    binds: str  #: "ssd", "copy", "compute", or two of them where neither waits for the other
    stall_seconds: float
    compute_seconds: float
    ssd_bytes: int
    copy_bytes: int | None  #: from DRAM to the GPU; None without a GPU
    memory_bytes: int  #: read by the compute, of its nearest tier
    ssd_share: float  #: of the time, in which the device is busy
    copy_share: float | None
    compute_share: float
    model_bytes: int
    dram_bytes: int
    gpu_bytes: int | None
    clients: int
    tokens_per_pass: int
    settled: bool  #: whether the passes came to cost the same
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    def summary(self) -> str:
        def row(name: str, share: float, what: str) -> str:
            return f"{name:<8} {share:>5.0%} busy, {what}"

        lines = [
            f"{self.seconds_per_token:.4g} s/token, {self.tokens_per_second:.4g} tokens/s; "
            f"{self.binds} binds",
            row("ssd", self.ssd_share, f"{size(self.ssd_bytes)} a token"),
        ]
        if self.copy_bytes is not None and self.copy_share is not None:
            lines.append(row("copy", self.copy_share, f"{size(self.copy_bytes)} a token"))
        lines += [
            row(
                "compute", self.compute_share,
                f"{duration(int(self.compute_seconds * SECOND_NS))} a token, over "
                f"{size(self.memory_bytes)} of weights",
            ),
            f"stall    {duration(int(self.stall_seconds * SECOND_NS))} a token",
            f"model    {size(self.model_bytes)}; DRAM {size(self.dram_bytes)}"
            + ("" if self.gpu_bytes is None else f", GPU {size(self.gpu_bytes)}"),
        ]  # fmt: skip
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])


def of_pack(path: Path) -> Model:
    """The model in a pack: its index, and of config.json whether the head is the embedding.

    Raises FormatError, CheckpointError, OSError.
    """
    index = open_pack(path)
    config = read_config(path / CONFIG)
    used = [
        number
        for number, layer in enumerate(index.layers)
        # Norms alone in a layer are copied once, and never asked for again.
        if any(sum(side > 1 for side in tensor.shape) > 1 for tensor in layer.tensors)
    ]
    embedding = _embedding(index)
    weights = [0 if number == embedding else index.layers[number].nbytes for number in used]
    order = list(used)
    if embedding is not None and config.get("tie_word_embeddings") and _headless(index):
        order.append(embedding)
        weights.append(index.layers[embedding].nbytes)
    experts = sum(".experts." in layer.name for layer in index.layers)
    notes = (f"{experts} layers are experts: each pass is taken to use all of them",)
    return Model(
        tuple(layer.nbytes for layer in index.layers), tuple(order), tuple(weights),
        notes if experts else (),
    )  # fmt: skip


def _embedding(index: PackIndex) -> int | None:
    """The layer that is only looked up, a few rows a token."""
    for number, layer in enumerate(index.layers):
        if any("embed" in tensor.name for tensor in layer.tensors):
            return number
    return None


def _headless(index: PackIndex) -> bool:
    return not any("head" in layer.name for layer in index.layers)


def of_layers(count: int, layer_bytes: int) -> Model:
    """Equal layers, without a pack. layer_bytes is rounded up to pages. Raises BadSetting."""
    _check_work(count, clients=1)
    nbytes = -(-layer_bytes // PAGE_BYTES) * PAGE_BYTES
    return Model((nbytes,) * count, tuple(range(count)), (1,) * count)


def _check_work(layers: int, clients: int) -> None:
    if layers * clients > MOST_LAYERS:
        raise BadSetting(
            f"{clients} clients with {layers} layers each are too much to simulate: at most "
            f"{MOST_LAYERS} layers in all"
        )


def predict(
    model: Model,
    node: Node,
    *,
    compute_seconds: float | None = None,
    memory_bandwidth: int | None = None,
    clients: int = 1,
    tokens_per_pass: int = 1,
) -> Report:
    """compute_seconds: of one pass of a client with everything resident, beside the others.
    memory_bandwidth: instead of it, packed bytes that a client computes with in a second.
    Raises NotServable with the numbers, BadSetting."""
    if compute_seconds is not None and memory_bandwidth is not None:
        raise BadSetting("give the compute time or the memory bandwidth, not both")
    _check_work(len(model.order), clients)
    if node.dram_bytes < node.granule_bytes:
        raise BadSetting(
            f"dram {size(node.dram_bytes)} is less than a page of {size(node.granule_bytes)}"
        )
    notes = list(model.notes)
    memory_bytes = sum(
        model.layer_bytes[layer]
        for layer, weight in zip(model.order, model.weights, strict=True)
        if weight
    )
    if memory_bandwidth is not None:
        compute_seconds = memory_bytes / memory_bandwidth
    elif compute_seconds is None:
        compute_seconds = 0.0
        notes.append("no compute time was given: it counts as none")
    total = sum(model.weights)
    compute_ns = tuple(
        int(compute_seconds * SECOND_NS * weight / total) for weight in model.weights
    )
    work = Work(model.layer_bytes, model.order, compute_ns, clients, tokens_per_pass)
    try:
        steady = steady_state(node, work)
    except DoesNotFit as error:
        gpu = "" if node.gpu_bytes is None else f" and {size(node.gpu_bytes)} of GPU"
        raise NotServable(
            f"{clients} client{'' if clients == 1 else 's'} on {size(node.dram_bytes)}{gpu}: "
            f"{error}"
        ) from error
    if not steady.settled:
        notes.append("the passes did not come to cost the same: a mean of the last ones")
    has_gpu = node.gpu_bytes is not None
    return Report(
        seconds_per_token=steady.pass_ns / SECOND_NS / tokens_per_pass,
        tokens_per_second=clients * tokens_per_pass * SECOND_NS / max(steady.pass_ns, 1),
        binds=binding_stage(steady),
        stall_seconds=steady.stall_ns / SECOND_NS / tokens_per_pass,
        compute_seconds=steady.compute_ns / SECOND_NS / tokens_per_pass,
        ssd_bytes=steady.ssd_bytes // tokens_per_pass,
        copy_bytes=steady.copy_bytes // tokens_per_pass if has_gpu else None,
        memory_bytes=memory_bytes // tokens_per_pass,
        ssd_share=steady.ssd_share,
        copy_share=steady.copy_share if has_gpu else None,
        compute_share=steady.compute_share,
        model_bytes=model.nbytes,
        dram_bytes=node.dram_bytes,
        gpu_bytes=node.gpu_bytes,
        clients=clients,
        tokens_per_pass=tokens_per_pass,
        settled=steady.settled,
        notes=tuple(notes),
    )


def binding_stage(steady: SteadyState) -> str:
    """The stages that are busy nearly all of the time, or the busiest."""
    shares = {
        "ssd": steady.ssd_share,
        "copy": steady.copy_share,
        "compute": steady.compute_share,
    }
    binding: Sequence[str] = [name for name, share in shares.items() if share >= BUSY]
    return " and ".join(binding or [max(shares, key=lambda name: shares[name])])
