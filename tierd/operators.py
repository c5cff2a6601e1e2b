"""What an operator commands: pin, unpin and evict, by the names of layers or patterns of them.

Only root and tierd's own user may. Pins belong to names: a model that is replaced or comes back in
a reload has them again, as far as the budget allows.
"""

from __future__ import annotations

import logging
import os
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from tierd.core.model import Done, EvictNow, LayerKey, Pin, Refuse, Unpin
from tierd.errors import AccessDenied, BadRequest, LayerNotFound

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd.engine import Engine
    from tierd.io.process import PeerCredentials
    from tierd.pack import Pack
    from tierd.registry import Registry
    from tierd.session import Session

log = logging.getLogger(__name__)

MAX_PATTERNS = 1024

_EVENTS: dict[str, type[Pin] | type[Unpin] | type[EvictNow]] = {
    "pin": Pin,
    "unpin": Unpin,
    "evict": EvictNow,
}


class Operators:
    """Turns commands into events of the core, and its answers into replies."""

    def __init__(self, engine: Engine, registry: Registry) -> None:
        self._engine = engine
        self._registry = registry
        self._pinned: dict[str, tuple[Pack, dict[str, None]]] = {}  #: by model name: its layers

    def command(self, session: Session, request: int, message: dict[str, Any]) -> None:
        """`layers` of the message: names or patterns, default all. Raises AccessDenied,
        ModelNotFound, LayerNotFound, BadRequest."""
        op, peer = message["op"], session.connection.peer
        check_operator(op, peer)
        name, patterns = message.get("model"), message.get("layers", [])
        if type(name) is not str:
            raise BadRequest(f"{op}: model is {name!r:.40}, expected a text")
        if (
            type(patterns) is not list
            or len(patterns) > MAX_PATTERNS
            or not all(type(pattern) is str for pattern in patterns)
        ):
            raise BadRequest(f"{op}: layers: expected a list of at most {MAX_PATTERNS} texts")
        absent = op == "unpin" and name in self._pinned and name not in self._registry.served
        pack = self._pinned[name][0] if absent else self._registry.find(name)
        log.info("uid %d (pid %d): %s %s %.400r", peer.uid, peer.pid, op, name, patterns)
        keys = _matching(pack, patterns)
        if absent:
            session.reply(request, self._unpin_absent(pack, keys))
        else:
            self._submit(session, request, pack, op, keys)

    def _unpin_absent(self, pack: Pack, keys: Sequence[LayerKey]) -> dict[str, Any]:
        """Of a model that is not served now: its pins wait for its return."""
        pinned = self._pinned[pack.name][1]
        layers = [pack.index.layers[key.layer] for key in keys]
        unpinned = [layer for layer in layers if layer.name in pinned]
        for layer in unpinned:
            del pinned[layer.name]
        if not pinned:
            del self._pinned[pack.name]
        return {
            "layers": [layer.name for layer in unpinned],
            "bytes": sum(layer.nbytes for layer in unpinned),
            "kept": [],
        }

    def model_served(self, pack: Pack) -> None:
        """A pack is in service, perhaps in place of another: it gets the pins of its name."""
        earlier = self._pinned.pop(pack.name, None)
        if earlier is None:
            return
        old, names = earlier
        self._submit(None, 0, old, "unpin", [LayerKey(old.model, n) for n in _numbers(old, names)])
        self._pinned.pop(pack.name, None)
        found = _numbers(pack, names)
        if len(found) < len(names):
            log.warning("model %s: %d pinned layers are in it no more", pack.name,
                len(names) - len(found),
            )  # fmt: skip
        if found:
            self._submit(None, 0, pack, "pin", [LayerKey(pack.model, number) for number in found])

    def _answered(
        self, session: Session | None, request: int, pack: Pack, op: str, answer: Done | Refuse
    ) -> None:
        """The core decided about a command."""
        if isinstance(answer, Refuse):
            if session is None:
                log.warning("model %s: %s is refused: %s", pack.name, op, answer.text)
            else:
                session.refuse(request, answer.code, answer.text)
            return
        layers = pack.index.layers
        names = [layers[key.layer].name for key in answer.keys]
        pinned = self._pinned.setdefault(pack.name, (pack, {}))[1]
        for name in names if op != "evict" else ():
            if op == "pin":
                pinned[name] = None
            else:
                pinned.pop(name, None)
        if not pinned:
            del self._pinned[pack.name]
        if session is not None:
            session.reply(
                request,
                {
                    "layers": names,
                    "bytes": sum(layers[key.layer].nbytes for key in answer.keys),
                    "kept": [
                        {"layer": layers[key.layer].name, "text": text} for key, text in answer.kept
                    ],
                },
            )

    def _submit(
        self, session: Session | None, request: int, pack: Pack, op: str, keys: Sequence[LayerKey]
    ) -> None:
        kind = _EVENTS[op]
        self._engine.command(
            lambda number: kind(self._engine.now(), number, tuple(keys)),
            lambda answer: self._answered(session, request, pack, op, answer),
        )


def check_operator(op: str, peer: PeerCredentials) -> None:
    """Raises AccessDenied for whom may not command."""
    if peer.uid not in (0, os.geteuid()):
        raise AccessDenied(
            f"{op} is for root and uid {os.geteuid()}, under which tierd runs; "
            f"you are uid {peer.uid}"
        )


def _matching(pack: Pack, patterns: Sequence[str]) -> list[LayerKey]:
    """The layers that any pattern matches; all without patterns. Raises LayerNotFound."""
    names = [layer.name for layer in pack.index.layers]
    for pattern in patterns:
        if pattern not in names and not any(fnmatchcase(name, pattern) for name in names):
            raise LayerNotFound(
                f"model {pack.name!r} has no layer {pattern[:200]!r}; it has {len(names)}, from "
                f"{names[0]!r} to {names[-1]!r}"
            )
    return [
        LayerKey(pack.model, number)
        for number, name in enumerate(names)
        if not patterns or any(name == p or fnmatchcase(name, p) for p in patterns)
    ]


def _numbers(pack: Pack, names: dict[str, None]) -> list[int]:
    return [number for number, layer in enumerate(pack.index.layers) if layer.name in names]
