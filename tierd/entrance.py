"""How a client comes in: its hello, on a tier, and the models that it opens there.

A GPU may still be opening, or making the arena of a model: then the request is parked, and answered
again from its beginning when that has changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tierd
from tierd import fields
from tierd.errors import AccessDenied, BadRequest, VersionMismatch
from tierd.io.process import start_time
from tierd_layouts import wire

if TYPE_CHECKING:
    from tierd.daemon import Daemon
    from tierd.gpu_tier import GpuTier
    from tierd.session import Session

MAX_NAME = 256
MAX_PARKED = 16  # requests of a connection


def hello(daemon: Daemon, session: Session, request: int, message: dict[str, Any]) -> None:
    """Raises what is refused."""
    if session.greeted or any(parked["op"] == "hello" for parked in session.parked.values()):
        raise BadRequest("hello was said already on this connection")
    version = fields.number(message, "version", 0, 1 << 31)
    if version != wire.PROTOCOL_VERSION:
        raise VersionMismatch(
            f"the client speaks protocol {version}, this tierd {tierd.__version__} speaks "
            f"{wire.PROTOCOL_VERSION}"
        )
    name = fields.text(message, "client")[:MAX_NAME]
    held = fields.numbers(message.get("held", []), "held", 1, fields.MAX_LEASE)
    tier = fields.text({"tier": wire.DRAM_TIER, **message}, "tier")
    connection = session.connection
    pid = connection.peer.pid
    if pid == 0:
        raise AccessDenied("your process lives in a PID namespace that tierd cannot see")
    try:
        process = (pid, start_time(pid))
    except ProcessLookupError:
        process = None
    if not connection.peer_lives():
        connection.close(f"process {pid} died")
        return
    # It lives, so what was read is about it and not about a successor of its pid.
    if process is None:
        raise AccessDenied(f"tierd cannot see /proc/{pid}, by which it knows who holds a lease")
    gpu = daemon.tiers.find(tier)
    if gpu is not None and not gpu.check_ready():
        _park(gpu, session, request, message)
        return
    session.name, session.process = name, process
    daemon.clients.greet(session, gpu, held)
    session.reply(
        request,
        {
            "version": wire.PROTOCOL_VERSION,
            "capabilities": [wire.GPU_CAPABILITY],
            "pid": daemon.pid,
            "daemon_version": tierd.__version__,
            "epoch": daemon.epoch,
            "tier": tier,
            **({} if gpu is None else {"device": gpu.described()}),
        },
    )


def open_model(daemon: Daemon, session: Session, request: int, message: dict[str, Any]) -> None:
    """Raises what is refused."""
    session.check_greeted()
    name = fields.text(message, "model")
    pack = daemon.registry.find(name)
    peer = session.connection.peer
    if not pack.access.admits(peer):
        raise AccessDenied(
            f"model {name!r} may be read by owner {pack.access.uid} and group "
            f"{pack.access.gid} with mode {pack.access.mode:03o}; you are uid {peer.uid}"
        )
    arena: dict[str, Any]
    if session.gpu is None:
        memory = daemon.arenas.by_id[pack.arena]
        arena = {"arena": memory.arena_id, "span_bytes": memory.span_bytes, "kind": "dram"}
        arena_fds = [memory.readonly_fd]
    else:
        place = session.gpu.arena_of(pack)
        if place is None:
            _park(session.gpu, session, request, message)
            return
        arena = {
            "arena": place.number,
            "span_bytes": place.span_bytes,
            "kind": session.gpu.device.kind,
            "chunk_bytes": session.gpu.device.chunk_bytes,
        }
        arena_fds = []
    with pack.client_files() as files:
        session.opened[pack.model] = pack
        pack.users.add(session.client)
        session.reply(
            request,
            {
                "model_id": pack.model,
                "files": list(pack.files),
                "arena": arena,
                "table": {"bytes": session.slots.nbytes},
            },
            [*files, *arena_fds, session.slots.readonly_fd],
        )


def _park(gpu: GpuTier, session: Session, request: int, message: dict[str, Any]) -> None:
    if session.is_used(request):
        raise BadRequest(f"request id {request} is in use")
    if len(session.parked) >= MAX_PARKED:
        raise BadRequest(f"{MAX_PARKED} requests wait for {gpu.name}, which is the limit")
    session.parked[request] = message
    gpu.wait(session)
