"""Why a layer is where it is, and the record of all decisions: the replies of why and trace.

Both tell what clients do with a model, so they are for those who may read it: `why` for the readers
of its model, `trace` for whoever may read every model that was ever in service.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]

import tierd
from tierd import fields
from tierd.core.model import LayerKey
from tierd.core.snapshot import memory_of
from tierd.core.transcript import SCHEMA, plain
from tierd.errors import AccessDenied, BadRequest, LayerNotFound, PackInvalid
from tierd.gpu_status import layers_on_gpus
from tierd_layouts.wire import DRAM_TIER

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tierd.access import AccessGroup
    from tierd.core.machine import TierMachine
    from tierd.core.story import Decision, Entry
    from tierd.daemon import Daemon
    from tierd.io.process import PeerCredentials
    from tierd.pack import Pack

Reply = dict[str, Any]

PAGE_ITEMS = 250  #: a page is made between two events: it must not hold the others up
PAGE_BYTES = 1 << 20  #: after which a page ends; the item that exceeds it is still in it
HISTORY = 200  #: decisions about a layer that `why` tells, the newest
LAST_ITEM = 1 << 62
_FEED = re.compile(r"client (-[0-9]+)")  # the core's own clients have no name there
PARTS = ("opening", "models", "entries")


class Diagnosis:
    """Reads the daemon; changes nothing."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    # ----------------------------------------------------------------------------------------- why

    def why(self, peer: PeerCredentials, message: dict[str, Any]) -> Reply:
        """Where a layer is on a tier, who needs it and what was decided about it. Raises
        ModelNotFound, LayerNotFound, AccessDenied, TierUnavailable."""
        name = message.get("model")
        if type(name) is not str:
            raise BadRequest(f"why: model is {name!r:.40}, expected a text")
        pack = self._daemon.registry.find(name)
        if not _may_see(peer, pack.access):
            raise AccessDenied(
                f"why model {name!r} is where it is, is for those who may read it; you are uid "
                f"{peer.uid}"
            )
        layer = _layer(pack, message.get("layer"))
        now_ns = self._daemon.engine.now()
        tier = fields.text({"tier": DRAM_TIER, **message}, "tier")
        machine = self._machine(tier)
        found = machine.whereabouts(LayerKey(pack.model, layer), now_ns)
        if found is None:
            raise PackInvalid(f"model {name!r} is not known to the scheduler of {tier}")
        extent = machine.record.extent
        return {
            "tier": tier,
            "gpus": self._on_gpus(pack, layer),
            "model": name,
            "layer": layer,
            "name": pack.index.layers[layer].name,
            "bytes": found.nbytes,
            "state": found.state,
            "demanded": found.demanded,
            "leased_by": [self._client(client) for client in found.leased_by],
            "quarantined": found.quarantined,
            "waiting": [self._client(client) for client in found.waiting],
            "planned_by": [self._client(client) for client in found.planned_by],
            "kept": found.kept,
            "pinned": found.pinned,
            "failed": found.failed,
            "next_use": found.next_use
            and {
                "client": self._client(found.next_use.client),
                "steps": found.next_use.steps,
                "in_ns": found.next_use.in_ns,
                "probability_ppm": found.next_use.probability_ppm,
            },
            "history": [
                {
                    "ago_ns": max(now_ns - decision.at_ns, 0),
                    "what": decision.what,
                    "text": self._text(decision, peer),
                }
                for decision in found.story[-HISTORY:]
            ],
            "record": {
                "reaches_ns": None if extent.first_ns is None else now_ns - extent.first_ns,
                "forgotten_events": extent.first,
                "forgotten_decisions": extent.forgotten_decisions,
            },
        }

    def _machine(self, tier: str) -> TierMachine:
        engine = self._daemon.engine
        gpu = self._daemon.tiers.find(tier)
        if gpu is None:
            return engine.machine
        assert engine.stack is not None
        return engine.stack.gpus[gpu.index]

    def _on_gpus(self, pack: Pack, layer: int) -> dict[str, str]:
        """By name of the GPU: the layer's state there."""
        daemon = self._daemon
        found = layers_on_gpus(daemon.tiers, daemon.engine, pack.model)
        return {name: layers[layer].state for name, layers in found.items()}

    def _client(self, client: int) -> Reply:
        if client in (feeds := self._feeds() if client < 0 else {}):
            name = self._daemon.tiers.gpus[feeds[client]].name
            return {"client": client, "name": f"copies to {name}"}
        session = self._daemon.clients.sessions.get(client)
        return {"client": client, "name": "" if session is None else session.name}

    def _feeds(self) -> dict[int, int]:
        """What GPUs take out of DRAM: the core's own clients, and the number of their GPU."""
        stack = self._daemon.engine.stack
        return (
            {} if stack is None else {feed.id: feed.gpu for feed in stack.exchange.feeds.values()}
        )

    def _text(self, decision: Decision, peer: PeerCredentials) -> str:
        """The reason, with layers by name; of another model only if the peer may know."""
        values = [
            self._layer_name(value, peer) if isinstance(value, LayerKey) else value
            for value in decision.values
        ]
        return _FEED.sub(self._feed_name, decision.reason.format(*values))

    def _feed_name(self, found: re.Match[str]) -> str:
        return str(self._client(int(found[1]))["name"]) or found[0]

    def _layer_name(self, key: LayerKey, peer: PeerCredentials) -> str:
        readers = self._daemon.registry.readers.get(key.model)
        if readers is None or not _may_see(peer, readers):
            return "a layer of another model"
        pack = self._daemon.registry.by_model.get(key.model)
        if pack is None or not 0 <= key.layer < len(pack.index.layers):
            return f"layer {key.layer} of a model that is gone"
        return f"{pack.index.layers[key.layer].name} of {pack.name}"

    # --------------------------------------------------------------------------------------- trace

    def trace(self, peer: PeerCredentials, message: dict[str, Any]) -> Reply:
        """A page of the record. `part` is one of PARTS, `first` the number of its first item; a
        page is empty at the end. `tier`: whose record, DRAM's by default. Each item is one
        msgpack text of its own."""
        for readers in self._daemon.registry.readers.values():
            if not _may_see(peer, readers):
                raise AccessDenied(
                    "the trace tells about all models, also those of readers "
                    f"{readers}, to whom you, uid {peer.uid}, do not belong"
                )
        part, first = message.get("part", "entries"), message.get("first", 0)
        if part not in PARTS:
            raise BadRequest(f"trace: part is {part!r:.40}, expected one of {', '.join(PARTS)}")
        if type(first) is not int or not 0 <= first <= LAST_ITEM:
            raise BadRequest(
                f"trace: first is {first!r:.40}, expected a number from 0 to {LAST_ITEM}"
            )
        machine = self._machine(fields.text({"tier": DRAM_TIER, **message}, "tier"))
        record = machine.record
        extent = record.extent
        reply: Reply = {
            "now_ns": self._daemon.engine.now(),
            "first": extent.first,
            "end": extent.end,
            "first_ns": extent.first_ns,
            "forgotten_decisions": extent.forgotten_decisions,
        }
        if part == "opening":
            reply["items"] = _page(plain(event) for event in record.opening()[first:])
            reply |= self._about(machine)
        elif part == "models":
            packs = list(self._daemon.registry.by_model.values())[first:]
            reply["items"] = _page(_model(pack) for pack in packs)
        else:
            first = max(first, extent.first)
            reply["items"] = _page(_entry(entry) for entry in record.entries(first, PAGE_ITEMS))
        reply["next"] = first + len(reply["items"])
        if part == "entries" and reply["next"] >= extent.end:
            memory = memory_of(machine.books)
            reply["memory"] = {  # at the end of the record: counters can be led back from here
                "resident_bytes": memory.resident_bytes,
                "leased_bytes": memory.leased_bytes,
            }
        return reply

    def _about(self, machine: TierMachine) -> Reply:
        """What the whole trace of a tier is about."""
        daemon = self._daemon
        return {
            "version": tierd.__version__,
            "unix_ns": time.time_ns(),
            "schema": {name: list(names) for name, names in SCHEMA.items()},
            "config": dataclasses.asdict(machine.config),
            "ssd_bandwidth_limit": daemon.config.ssd_bandwidth,
            "clients": [
                {"client": client, "name": session.name, "pid": session.connection.peer.pid}
                for client, session in daemon.clients.sessions.items()
            ]
            + [{**self._client(feed), "pid": daemon.pid} for feed in self._feeds()],
            "tiers": [DRAM_TIER, *(gpu.name for gpu in daemon.tiers.gpus)],
        }


def _may_see(peer: PeerCredentials, readers: AccessGroup) -> bool:
    return peer.uid == os.geteuid() or readers.admits(peer)


def _layer(pack: Pack, wanted: object) -> int:
    """The number of a layer that was named, or numbered."""
    layers = pack.index.layers
    if type(wanted) is int and 0 <= wanted < len(layers):
        return wanted
    if type(wanted) is str:
        for number, layer in enumerate(layers):
            if layer.name == wanted:
                return number
    if type(wanted) not in (int, str):
        raise BadRequest(f"why: layer is {wanted!r:.40}, expected a name or a number")
    raise LayerNotFound(
        f"model {pack.name!r} has no layer {wanted!r:.80}, it has {len(layers)}, from "
        f"{layers[0].name!r} to {layers[-1].name!r}"
    )


def _page(items: Iterable[Any]) -> list[bytes]:
    packed: list[bytes] = []
    nbytes = 0
    for item in items:
        packed.append(msgpack.packb(item, use_bin_type=True))
        nbytes += len(packed[-1])
        if nbytes >= PAGE_BYTES or len(packed) == PAGE_ITEMS:
            break
    return packed


def _model(pack: Pack) -> list[Any]:
    return [pack.model, pack.name, [layer.name for layer in pack.index.layers]]


def _entry(entry: Entry) -> list[Any]:
    """[number, at_ns, event, actions, decisions]; a decision is [what, layer or None, text]."""
    return [
        entry.number,
        entry.at_ns,
        plain(entry.event),
        [plain(action) for action in entry.actions],
        list(_decisions(entry)),
    ]


def _decisions(entry: Entry) -> Iterator[list[Any]]:
    for decision in entry.decisions:
        key = decision.key
        layer = None if key is None else [key.model, key.layer]
        yield [decision.what, layer, decision.text]
