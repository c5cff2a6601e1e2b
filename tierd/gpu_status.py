"""What tierd says about its GPUs. Bytes and nanoseconds, at the moment of the question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tierd.core.snapshot import counters_of, layers_of, memory_of
from tierd.gpu_settings import PLAYED_VARIABLE, played_library

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tierd.core.snapshot import LayerSnapshot
    from tierd.engine import Engine
    from tierd.gpu_tier import GpuTier
    from tierd.session import Session
    from tierd.tiers import Tiers

Reply = dict[str, Any]

_SECOND_NS = 1_000_000_000


def status_of(gpu: GpuTier, engine: Engine) -> Reply:
    """One GPU, whether it works or not."""
    assert engine.stack is not None
    books = engine.stack.gpus[gpu.index].books
    memory, counters = memory_of(books), counters_of(books)
    worker = gpu.worker.statistics()
    return {
        "tier": gpu.name,
        "device": gpu.device.kind,
        "name": None if gpu.info is None else gpu.info.name,
        "driver": None if gpu.info is None else gpu.info.driver,
        "state": gpu.state,
        "reason": gpu.reason or gpu.memory.note or "",
        "budget_bytes": memory.budget_bytes,
        "above_budget_bytes": memory.above_budget_bytes,
        "used_bytes": memory.used_bytes,
        "peak_bytes": memory.peak_bytes,
        "resident_bytes": memory.resident_bytes,
        "leased_bytes": memory.leased_bytes,
        "in_flight_bytes": memory.in_flight_bytes,
        "quarantined_bytes": memory.quarantined_bytes,
        "backed_bytes": gpu.device.backed_bytes,
        "chunk_bytes": gpu.device.chunk_bytes,
        "total_bytes": None if gpu.info is None else gpu.info.total_bytes,
        "copies": worker.copies,
        "copied_bytes": worker.copied_bytes,
        "copies_failed": worker.failed,
        "busy_ns": worker.busy_ns,
        "copy_bytes_per_s": (
            worker.copied_bytes * _SECOND_NS // worker.busy_ns if worker.busy_ns else None
        ),
        "link_bytes_per_s": engine.stack.copy_bandwidths().get(gpu.index),
        "unpinned_bytes": gpu.device.unpinned_bytes,
        "direct": _direct_of(gpu),
        "clients_scratch_bytes": sum(gpu.scratch.values()),
        "unfenced_clients": len(gpu.fences),
        "grants": counters.grants,
        "hits": counters.hits,
        "misses": counters.misses,
        "later": counters.later,
        "refusals": counters.refusals,
        "evictions": counters.evictions,
        "stall_ns": counters.stall_ns,
    }


def _direct_of(gpu: GpuTier) -> Reply | None:
    """What came past DRAM: our figures of this GPU, and cuFile's own, of all GPUs together."""
    if gpu.direct is None:
        return None
    counted = gpu.direct.statistics()
    return {
        "layers": gpu.filling.direct_layers,
        "bytes": gpu.filling.direct_bytes,
        "failed": counted.failed,
        "cufile_bytes": counted.read_bytes,
        "cufile_direct_reads": counted.direct_reads,
        "cufile_posix_reads": counted.posix_reads,
    }


def layers_on_gpus(tiers: Tiers, engine: Engine, model: int) -> dict[str, Sequence[LayerSnapshot]]:
    """By name of the GPU: the model's layers on it. GPUs on which it is not placed are not in."""
    if engine.stack is None:
        return {}
    books = {gpu.name: engine.stack.gpus[gpu.index].books for gpu in tiers.gpus}
    return {name: layers_of(of, model) for name, of in books.items() if model in of.models}


def residency_of(layer: LayerSnapshot) -> Reply:
    """A layer on one GPU."""
    return {
        "state": layer.state,
        "leases": layer.leases,
        "slot": layer.slot,
        "generation": layer.generation,
    }


def notes_of(tiers: Tiers, sessions: Mapping[int, Session]) -> list[str]:
    """What an operator should know about the GPUs."""
    notes = [
        f"tier {gpu.name} is not served: {gpu.reason}"
        for gpu in tiers.gpus
        if gpu.state == "failed"
    ]
    notes += tiers.silent().values()
    notes += tiers.registrar.notes() if tiers.registrar is not None else []
    if tiers.direct is not None and (played := played_library()) is not None:
        notes.append(f"cuFile is played by {played} ({PLAYED_VARIABLE}): nothing here is direct")
    for gpu in tiers.gpus:
        notes += [
            f"{sessions[client]} was asked to unmap memory of {gpu.name} and does not answer"
            for client in sorted(gpu.memory.late_clients())
            if client in sessions
        ]
    return notes
