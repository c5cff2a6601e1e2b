"""One client: what it has opened, what it waits for, what it holds.

A request is answered here, or becomes an event of the core and is answered when the core decides.
The client is never trusted: every field is checked, everything that it can pile up is bounded.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

from tierd import entrance, fields, gpu_requests, layer_requests
from tierd.core.model import LayerKey, PlanOver
from tierd.errors import (
    BadRequest,
    ModelGone,
    NotAdmitted,
    ShuttingDown,
    UnknownOp,
)
from tierd_layouts import wire
from tierd_layouts.errors import FrameTooLarge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd.connection import Connection
    from tierd.core.model import Admit, Grant, Later, Refuse
    from tierd.daemon import Daemon
    from tierd.gpu_tier import GpuTier
    from tierd.holders import Holders
    from tierd.pack import Pack
    from tierd.slots import Slots

log = logging.getLogger(__name__)

MAX_OUTSTANDING = 256  # plans and acquires that wait for the core
MAX_REQUEST_ID = (1 << 63) - 1


class Session:
    """The owner of one connection."""

    def __init__(self, daemon: Daemon, connection: Connection, client: int) -> None:
        self._daemon = daemon
        self.connection = connection
        self.client = client
        self.greeted = False
        self.name = ""
        self.process = (connection.peer.pid, 0)
        self.connected_ns = time.monotonic_ns()
        self.gpu: GpuTier | None = None  #: the tier that it is on, None: DRAM
        self.slots: Slots  #: of its tier, from its hello on
        self.holders: Holders  #: of its tier, likewise
        self.opened: dict[int, Pack] = {}
        self.leases: dict[int, Grant] = {}
        self.granted = 0
        self.released_ns = 0  #: when it gave a lease back last
        self.exporting = 0  #: requests for chunks that the GPU's worker has
        self.position: LayerKey | None = None  #: what it asked for last
        self._outstanding: dict[int, Pack] = {}
        self._pidfd = -1  # of the process, while it is a client of a GPU
        self.parked: dict[int, dict[str, Any]] = {}  #: requests that wait for a GPU

    def __str__(self) -> str:
        return f"client {self.client} ({self.name!r}, pid {self.process[0]})"

    @property
    def scratch_bytes(self) -> int:
        """What it says it uses of its GPU beside its leases."""
        return 0 if self.gpu is None else self.gpu.scratch.get(self.client, 0)

    # ----------------------------------------------------------------------------- from the socket

    def received(self, message: dict[str, Any]) -> None:
        request, op = message.get("id"), message.get("op")
        if type(request) is not int or not 0 <= request <= MAX_REQUEST_ID or type(op) is not str:
            self.connection.reject(f"sent a request without id and op: {sorted(message)[:8]}")
            return
        if request == 0 and op not in ("release", "hint"):
            self.connection.reject(
                f"asked for {op[:40]!r} with id 0, which only release and hint may have"
            )
            return
        self._daemon.clients.answer(self, request, op, message)

    def enter(self, gpu: GpuTier | None) -> None:
        """From now on it is a client of that GPU, or of DRAM."""
        owner: GpuTier | Daemon = self._daemon
        if gpu is not None:
            self._pidfd = os.dup(self.connection.pidfd)  # for the fence, after the connection
            owner = self.gpu = gpu
        self.slots, self.holders = owner.slots, owner.holders

    def is_used(self, request: int) -> bool:
        """Whether a request of that id is not answered yet."""
        return request in self._outstanding or request in self.parked

    def go_on(self) -> None:
        """The GPU that parked requests wait for was opened, or has made an arena, or failed."""
        parked, self.parked = self.parked, {}
        for request, message in parked.items():
            if not self.connection.closed:
                self._daemon.clients.answer(self, request, message["op"], message)

    def leave(self, *, fence: bool) -> None:
        """The connection is over; what is on a GPU is fenced, unless the daemon ends anyway."""
        if self.gpu is None:
            return
        if fence:
            self.gpu.left(self.client, self.process[0], self._pidfd)
        else:
            os.close(self._pidfd)

    def ended(self, reason: str) -> None:
        self._daemon.clients.ended(self, reason)

    def answer(self, request: int, op: str, message: dict[str, Any]) -> None:
        """Answer, or submit an event that will be. Raises TierdError for what is refused here."""
        match op:
            case "acquire":
                layer_requests.acquire(self._daemon, self, request, message)
            case "release":
                layer_requests.release(self._daemon, self, request, message)
            case "plan":
                layer_requests.plan(self._daemon, self, request, message)
            case "hint":
                layer_requests.hint(self._daemon, self, request, message)
            case "open":
                entrance.open_model(self._daemon, self, request, message)
            case "close":
                self._close(request, message)
            case "hello":
                entrance.hello(self._daemon, self, request, message)
            case "chunks":
                gpu_requests.chunks(self, request, message)
            case "attend":
                gpu_requests.attend(self, request, message)
            case "status" | "models" | "clients" | "config":
                self.reply(request, getattr(self._daemon.statistics, op)())
            case "layers":
                self.reply(request, self._daemon.statistics.layers(fields.text(message, "model")))
            case "pin" | "unpin" | "evict":
                self._daemon.engine.operators.command(self, request, message)
            case "budget":
                self._daemon.budget_commands.command(self, request, message)
            case "why":
                self.reply(request, self._daemon.diagnosis.why(self.connection.peer, message))
            case "trace":
                self.reply(request, self._daemon.diagnosis.trace(self.connection.peer, message))
            case "reload":
                self._daemon.models.reload_for(self, request)
            case _:
                raise UnknownOp(f"op {op[:80]!r} is not one of protocol {wire.PROTOCOL_VERSION}")

    def _close(self, request: int, message: dict[str, Any]) -> None:
        pack = self.model(message)
        if pack in self._outstanding.values():
            raise BadRequest(f"model {pack.name!r} has unanswered requests of this client")
        del self.opened[pack.model]
        self._daemon.engine.submit(PlanOver(time.monotonic_ns(), self.client, pack.model))
        self._daemon.clients.closed(self, pack)
        self.reply(request, {})

    def check_greeted(self) -> None:
        if not self.greeted:
            raise BadRequest("say hello first")

    def model(self, message: dict[str, Any]) -> Pack:
        """The one that a request is about. Raises NotAdmitted, ModelGone."""
        self.check_greeted()
        model = message.get("model_id")
        pack = self.opened.get(model) if type(model) is int else None
        if pack is None:
            raise NotAdmitted(f"model id {model!r:.40} was not opened on this connection")
        if pack.state == "removed" and message["op"] != "close":
            raise ModelGone(f"model {pack.name!r} was removed")
        return pack

    def wait_for_core(self, request: int, pack: Pack) -> None:
        """The core will answer the request. Raises BadRequest where too many wait."""
        if self.is_used(request):
            raise BadRequest(f"request id {request} is in use")
        if len(self._outstanding) >= MAX_OUTSTANDING:
            raise BadRequest(f"{MAX_OUTSTANDING} requests wait already, which is the limit")
        self._outstanding[request] = pack
        self._daemon.clients.outstanding += 1

    @property
    def outstanding(self) -> int:
        """Plans and acquires that wait for the core."""
        return len(self._outstanding)

    def _answered(self, request: int) -> None:
        del self._outstanding[request]
        self._daemon.clients.outstanding -= 1

    def forget_outstanding(self) -> None:
        """Nobody will answer what still waits."""
        self._daemon.clients.outstanding -= len(self._outstanding)
        self._outstanding.clear()
        self.parked.clear()

    # ------------------------------------------------------------------------------- from the core

    def lease_granted(self, grant: Grant) -> None:
        self._answered(grant.request)
        self.leases[grant.lease] = grant
        self.granted += 1
        self.holders.granted(self.client, self.process)
        self.reply(
            grant.request,
            {
                "lease": grant.lease,
                "slot": grant.slot,
                "generation": grant.generation,
                "arena": grant.arena,
                "offset": grant.offset,
                "bytes": grant.nbytes,
                "waited_ns": grant.waited_ns,
            },
        )

    def told_later(self, later: Later) -> None:
        self._answered(later.request)
        self.reply(later.request, {"later": True})

    def plan_admitted(self, admit: Admit) -> None:
        self._answered(admit.request)
        self.reply(admit.request, {"minimum_bytes": admit.minimum_bytes})

    def refused(self, refusal: Refuse) -> None:
        self._answered(refusal.request)
        log.info("%s is refused: %s: %s", self, refusal.code, refusal.text)
        self.refuse(refusal.request, refusal.code, refusal.text)

    def shut_down(self) -> None:
        """Answer everything that still waits, and close when the answers were sent."""
        for request in (*self._outstanding, *self.parked):
            self.refuse(request, ShuttingDown.code, "tierd is shutting down")
        self.forget_outstanding()
        self.connection.close_after_sending("tierd is shutting down")

    # ------------------------------------------------------------------------------- to the socket

    def reply(self, request: int, fields: dict[str, Any], fds: Sequence[int] = ()) -> None:
        if not request:
            return
        try:
            self.connection.send({"id": request, "ok": True, **fields}, fds)
        except FrameTooLarge as error:
            self.refuse(request, wire.ErrorCode.INTERNAL, f"the answer is too long: {error}")

    def refuse(self, request: int, code: str, text: str) -> None:
        if request:
            error = {"code": str(code), "text": text}
            self.connection.send({"id": request, "ok": False, "error": error})
        else:
            log.info("%s: %s", self, text)
