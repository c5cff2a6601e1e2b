"""What a client asks of layers: it plans, hints, acquires and gives back.

Every field is checked, and how much it can ask for is bounded; the core decides.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from tierd import fields
from tierd.core.model import CERTAIN_PPM, PLAN_KINDS, Acquire, Hint, LayerKey, Plan
from tierd.errors import BadRequest, LayerNotFound, LeaseLimit
from tierd_layouts import wire

if TYPE_CHECKING:
    from tierd.daemon import Daemon
    from tierd.session import Session

MAX_LEASES = 1024  # held at once
MAX_LOOKAHEAD = MAX_LEASES
#: Of each layer, on average: the core walks a plan while layers of it are missing.
MAX_PLAN_USES = 16
MAX_TOKENS_PER_PASS = 1 << 24


def plan(daemon: Daemon, session: Session, request: int, message: dict[str, Any]) -> None:
    """The core answers whether it is admitted."""
    pack = session.model(message)
    order = fields.numbers(message.get("order"), "order", 0, len(pack.keys) - 1)
    kind = message.get("kind", "cyclic")
    if kind not in PLAN_KINDS:
        raise BadRequest(f"plan: kind is {kind!r:.40}, expected one of {', '.join(PLAN_KINDS)}")
    tokens = fields.number(message, "tokens_per_pass", 1, MAX_TOKENS_PER_PASS, default=1)
    lookahead = fields.number(message, "lookahead", 0, MAX_LOOKAHEAD, default=1)
    longest = MAX_PLAN_USES * len(pack.keys)
    if not 0 < len(order) <= longest:
        raise BadRequest(
            f"plan: the order has {len(order)} layers, expected 1 to {longest} "
            f"({MAX_PLAN_USES} times those of model {pack.name!r})"
        )
    session.wait_for_core(request, pack)
    daemon.engine.submit(
        Plan(
            time.monotonic_ns(), session.client, request, pack.model, tuple(order), kind,
            lookahead, tokens,
        )
    )  # fmt: skip


def hint(daemon: Daemon, session: Session, request: int, message: dict[str, Any]) -> None:
    """Advice: answered at once."""
    pack = session.model(message)
    layers = fields.numbers(message.get("layers"), "layers", 0, len(pack.keys) - 1)
    certain = [CERTAIN_PPM] * len(layers)
    ppm = fields.numbers(message.get("ppm", certain), "ppm", 0, CERTAIN_PPM)
    if len(ppm) != len(layers):
        raise BadRequest(f"hint: {len(layers)} layers and {len(ppm)} probabilities")
    if len(set(layers)) != len(layers):
        raise BadRequest("hint: a layer is there twice")
    steps = fields.number(message, "steps", 1, wire.MAX_HINT_STEPS, default=1)
    daemon.engine.submit(
        Hint(time.monotonic_ns(), session.client, pack.model, tuple(layers), tuple(ppm), steps)
    )
    session.reply(request, {})


def acquire(daemon: Daemon, session: Session, request: int, message: dict[str, Any]) -> None:
    """The core answers with a lease, or why not; a layer ahead, maybe, with `later`."""
    pack = session.model(message)
    layer = message.get("layer")
    if type(layer) is not int:
        raise BadRequest(f"acquire: layer is {layer!r:.40}, expected a number")
    if not 0 <= layer < len(pack.keys):
        raise LayerNotFound(f"model {pack.name!r} has no layer {layer}, it has {len(pack.keys)}")
    ahead = message.get("ahead", False)
    if type(ahead) is not bool:
        raise BadRequest(f"acquire: ahead is {ahead!r:.40}, expected true or false")
    if len(session.leases) + session.outstanding >= MAX_LEASES:
        raise LeaseLimit(
            f"{len(session.leases)} leases are held, {session.outstanding} asked for; "
            f"the limit is {MAX_LEASES}: release first"
        )
    if not daemon.clients.lease_possible(session):
        raise LeaseLimit("the slot table has no room for more leases of all clients together")
    session.wait_for_core(request, pack)
    key = session.position = LayerKey(pack.model, layer)
    daemon.engine.submit(Acquire(time.monotonic_ns(), session.client, request, key, ahead))


def release(daemon: Daemon, session: Session, request: int, message: dict[str, Any]) -> None:
    """Raises BadRequest for leases that are not its own; the others are given back all the same."""
    session.check_greeted()
    session.released_ns = time.monotonic_ns()
    unknown: list[int] = []
    for lease in fields.numbers(message.get("leases"), "leases", 1, fields.MAX_LEASE):
        if session.leases.pop(lease, None) is not None:
            daemon.clients.release(session, lease)
        elif session.gpu is not None or not daemon.clients.release_orphan(session, lease):
            unknown.append(lease)
    if unknown:
        raise BadRequest(f"leases {unknown[:8]} are not held by this client")
    session.reply(request, {})
