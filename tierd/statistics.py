"""What tierd says about itself: the replies of status, models, layers, clients and config.

Bytes and nanoseconds everywhere. The numbers are the core's own books and the devices' counters at
the moment of the question.
"""

from __future__ import annotations

import os
import pwd
import time
from typing import TYPE_CHECKING, Any

import tierd
from tierd.core.snapshot import clients_of, counters_of, layers_of, memory_of
from tierd.errors import PackInvalid
from tierd.gpu_status import layers_on_gpus, notes_of, residency_of, status_of
from tierd.sizes import format_size
from tierd_layouts.wire import DRAM_TIER

if TYPE_CHECKING:
    from tierd.core.prediction import Prediction
    from tierd.core.snapshot import ClientSnapshot
    from tierd.daemon import Daemon
    from tierd.pack import Pack

Reply = dict[str, Any]

KEPT_LEASES = 2  # that a client needs which is in one layer and asked for the next one
UNHEEDED_NS = 1_500_000_000  # a client looks 20 times a second, a plan waits for 2 s


class Statistics:
    """Reads the daemon; changes nothing."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def status(self) -> Reply:
        daemon = self._daemon
        books = daemon.engine.machine.books
        memory, counters = memory_of(books), counters_of(books)
        readers = daemon.pool.statistics()
        return {
            "daemon": {
                "pid": daemon.pid,
                "version": tierd.__version__,
                "uptime_ns": time.monotonic_ns() - daemon.started_ns,
                "socket": daemon.socket_path,
                "epoch": daemon.epoch,
                "rss_bytes": own_memory_bytes(),
                "user": _user(os.geteuid()),
            },
            "dram": {
                "budget_bytes": memory.budget_bytes,
                "used_bytes": memory.used_bytes,
                "peak_bytes": memory.peak_bytes,
                "resident_bytes": memory.resident_bytes,
                "leased_bytes": memory.leased_bytes,
                "in_flight_bytes": memory.in_flight_bytes,
                "quarantined_bytes": memory.quarantined_bytes,
                "pinned_bytes": memory.pinned_bytes,
                "populated_bytes": daemon.arenas.populated_bytes,
                "pages": daemon.arenas.pages_text,
                "locked_bytes": daemon.arenas.locked_bytes,
            },
            "ssd": {
                "read_bytes": readers.read_bytes,
                "reads": readers.reads,
                "failed": readers.failed,
                "busy_ns": readers.busy_ns,
                "bandwidth_limit": daemon.config.ssd_bandwidth,
                "devices": daemon.costs.status(),
            },
            "scheduler": {
                "grants": counters.grants,
                "hits": counters.hits,
                "misses": counters.misses,
                "later": counters.later,
                "refusals": counters.refusals,
                "evictions": counters.evictions,
                "stall_ns": counters.stall_ns,
            },
            "gpus": [status_of(gpu, daemon.engine) for gpu in daemon.tiers.gpus],
            "models": len(daemon.registry.served),
            "clients": len(daemon.clients.sessions),
            "notes": self._notes(),
        }

    def models(self) -> Reply:
        daemon = self._daemon
        layers = daemon.engine.machine.snapshot().models
        replies = [
            {
                "name": pack.name,
                "model_id": pack.model,
                "pack_bytes": pack.index.pack_bytes,
                "dense_bytes": pack.index.dense_bytes,
                "layers": len(pack.index.layers),
                "resident_layers": sum(
                    layer.state == "resident" for layer in layers.get(pack.model, ())
                ),
                "clients": len(pack.users),
                "path": str(pack.path),
                "state": pack.state,
            }
            for pack in sorted(daemon.registry.by_model.values(), key=_by_name)
        ]
        replies += [
            {
                "name": name,
                "model_id": 0,
                "pack_bytes": 0,
                "dense_bytes": 0,
                "layers": 0,
                "resident_layers": 0,
                "clients": 0,
                "path": "",
                "state": f"failed: {text}",
            }
            for name, text in sorted(daemon.registry.failed.items())
            if name not in daemon.registry.served
        ]
        return {"models": replies}

    def layers(self, model: str) -> Reply:
        """Raises ModelNotFound or PackInvalid."""
        pack = self._daemon.registry.find(model)
        books = self._daemon.engine.machine.books
        if pack.model not in books.models:
            raise PackInvalid(f"model {model!r} is not known to the scheduler")
        states = layers_of(books, pack.model)
        on_gpus = layers_on_gpus(self._daemon.tiers, self._daemon.engine, pack.model)
        return {
            "model": model,
            "layers": [
                {
                    "layer": state.layer,
                    "name": pack.index.layers[state.layer].name,
                    "bytes": state.nbytes,
                    "state": state.state,
                    "pinned": state.pinned,
                    "leases": state.leases,
                    "slot": state.slot,
                    "generation": state.generation,
                    "next_use": state.next_use,
                    "gpus": {
                        name: residency_of(layers[state.layer]) for name, layers in on_gpus.items()
                    },
                }
                for state in states
            ],
        }

    def clients(self) -> Reply:
        daemon = self._daemon
        replies = []
        predictions = daemon.costs.predictions()
        for state in self._client_states():
            session = daemon.clients.sessions[state.client]
            last = session.position
            pack = None if last is None else session.opened.get(last.model)
            replies.append(
                {
                    "client": state.client,
                    "name": session.name,
                    "pid": session.connection.peer.pid,
                    "uid": session.connection.peer.uid,
                    "model": None if pack is None else pack.name,
                    "position": None if last is None else last.layer,
                    "leases": state.leases,
                    "leased_bytes": state.leased_bytes,
                    "reserved_bytes": state.reserved_bytes,
                    "stall_ns": state.stall_ns,
                    "granted": state.granted,
                    "weight": state.weight,
                    "read_bytes": state.read_bytes,
                    "plan": state.kind,
                    "tokens_per_pass": state.tokens_per_pass,
                    "connected_ns": time.monotonic_ns() - session.connected_ns,
                    "predicted": _prediction(predictions.get(state.client)),
                    "tier": DRAM_TIER if session.gpu is None else session.gpu.name,
                    "scratch_bytes": session.scratch_bytes,
                }
            )
        return {"clients": replies}

    def _client_states(self) -> list[ClientSnapshot]:
        """Of all tiers, in the order in which they came; ids below 0 are the core's own."""
        engine = self._daemon.engine
        machines = [engine.machine, *(engine.stack.gpus if engine.stack else ())]
        states = [state for machine in machines for state in clients_of(machine.books)]
        return sorted(
            (state for state in states if state.client in self._daemon.clients.sessions),
            key=lambda state: state.client,
        )

    def config(self) -> Reply:
        return {"config": self._daemon.budget_commands.config(self._daemon.costs.config())}

    def _notes(self) -> list[str]:
        daemon = self._daemon
        uid = os.geteuid()
        notes = [
            f"clients of uid {uid} ({_user(uid)}), under which tierd runs, are protected against "
            "mistakes only: they could write into the arenas"
        ]
        notes += daemon.arenas.notes()
        notes += daemon.pool.notes()
        notes += notes_of(daemon.tiers, daemon.clients.sessions)
        notes += [f"model {name}: {text}" for name, text in daemon.registry.failed.items()]
        notes += self._keepers()
        if daemon.clients.orphans:
            notes.append(
                f"{len(daemon.clients.orphans)} leases of an earlier daemon are in quarantine"
            )
        return notes

    def _keepers(self) -> list[str]:
        """Clients that kept leases when others wanted the memory: stopped ones, or hung."""
        now_ns = time.monotonic_ns()
        notes = []
        for state in self._client_states():
            session = self._daemon.clients.sessions[state.client]
            tier = self._daemon.engine if session.gpu is None else session.gpu
            since_ns = max(session.released_ns, session.connected_ns)
            if (
                state.leases > KEPT_LEASES
                and tier.pressure.unheeded_ns(since_ns, now_ns) > UNHEEDED_NS
            ):
                notes.append(
                    f"{session} keeps {state.leases} leases ({format_size(state.leased_bytes)}), "
                    f"gave none back for {(now_ns - since_ns) / 1e9:.0f} s, and others wanted them"
                )
        return notes


def _prediction(found: Prediction | None) -> Reply | None:
    """What the client has to expect of a pass; None without a cyclic plan or a measured device."""
    if found is None:
        return None
    return {
        "pass_ns": found.pass_ns,
        "compute_ns": found.compute_ns,
        "ssd_ns": found.ssd_ns,
        "copy_ns": found.copy_ns,
        "stall_ns": found.stall_ns,
        "ns_per_token": found.ns_per_token,
        "binds": found.binds,
    }


def _by_name(pack: Pack) -> tuple[str, int]:
    return (pack.name, pack.model)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def own_memory_bytes() -> int:
    """Memory of this process beside the arenas: resident, without shared memory."""
    fields: dict[str, int] = {}
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name in ("RssAnon", "RssFile"):
                fields[name] = int(value.split()[0]) * 1024
    return sum(fields.values())
