"""Who is connected: whom the daemon lets in, and what those leave behind who go.

This is the task boundary of one request: a fault while answering one client ends that connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

from tierd.core.errors import CoreError
from tierd.core.model import ClientGone, ClientJoined, HolderGone, Release
from tierd.errors import ShuttingDown, TierdError, TooManyClients
from tierd.recovery import Orphans
from tierd.session import Session
from tierd_layouts import wire

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tierd.connection import Connection
    from tierd.daemon import Daemon
    from tierd.gpu_tier import GpuTier
    from tierd.pack import Pack
    from tierd_layouts.slot_entries import LeaseEntry

log = logging.getLogger(__name__)

DRAIN_SECONDS = 1.0  # what clients have to read their last answers


class Clients:
    """Belongs to the loop's thread."""

    def __init__(self, daemon: Daemon) -> None:
        self.sessions: dict[int, Session] = {}  #: those that said hello
        self.outstanding = 0  #: requests of all sessions that the core has not answered
        self.orphans: Orphans
        self._daemon = daemon
        self._connected: dict[int, Session] = {}
        self._next_client = 1
        self.stopping = False  #: what comes now is refused
        self._all_left = asyncio.Event()

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer, or the daemon ends. Thread-safe."""
        return self.stopping or bool(self.outstanding)

    def expect(self, loop: asyncio.AbstractEventLoop, held: Iterable[LeaseEntry] = ()) -> None:
        """held: leases that clients of an earlier daemon may still have."""
        self.orphans = Orphans(loop, held, self._orphan_ended)

    def joined(self, connection: Connection) -> None:
        client = self._next_client
        self._next_client += 1
        self._connected[client] = session = Session(self._daemon, connection, client)
        connection.start(session)

    def answer(self, session: Session, request: int, op: str, message: dict[str, Any]) -> None:
        try:
            if self.stopping:
                raise ShuttingDown("tierd is shutting down")
            session.answer(request, op, message)
        except TierdError as error:
            session.refuse(request, error.code, error.text)
        except CoreError:
            raise
        except Exception:
            log.exception("%s: fault while answering %.80r", session, op)
            session.refuse(
                request, wire.ErrorCode.INTERNAL, f"tierd failed on {op[:80]!r}: see its log"
            )
            session.connection.close_after_sending("tierd failed while answering")

    def greet(self, session: Session, gpu: GpuTier | None, held: list[int]) -> None:
        """A client said hello, on a GPU or on DRAM. Raises TooManyClients."""
        config, engine = self._daemon.config, self._daemon.engine
        if len(self.sessions) >= config.max_clients:
            raise TooManyClients(
                f"{len(self.sessions)} clients are connected, max_clients is {config.max_clients}"
            )
        session.enter(gpu)
        session.greeted = True
        self.sessions[session.client] = session
        weight = config.weight_of(session.connection.peer.uid)
        if gpu is not None:
            log.info("%s joined on %s", session, gpu.name)
            gpu.joined(session, weight)
            return
        kept = self.orphans.hello(session.client, session.process, held)
        log.info("%s joined%s", session, f", holding {len(kept)} old leases" if kept else "")
        engine.submit(ClientJoined(engine.now(), session.client, weight))

    def ended(self, session: Session, reason: str) -> None:
        """Its connection is over."""
        del self._connected[session.client]
        self._daemon.connection_ended(session)
        self._check_all_left()
        if not session.greeted:
            log.debug("%s: %s", session, reason)
            return
        log.info("%s left with %d leases: %s", session, len(session.leases), reason)
        del self.sessions[session.client]
        if self.stopping:
            session.leave(fence=False)
            return
        session.forget_outstanding()
        for lease in session.leases:
            session.slots.end(lease)
        session.holders.gone(session.client)
        if session.gpu is not None:
            session.leave(fence=True)
        else:
            self.orphans.client_gone(session.client)
            engine = self._daemon.engine
            engine.submit(ClientGone(engine.now(), session.client))
        for pack in session.opened.values():
            self.closed(session, pack)

    def closed(self, session: Session, pack: Pack) -> None:
        """`session` does not use `pack` any more."""
        pack.users.discard(session.client)
        self._daemon.models.retire(pack)

    # -------------------------------------------------------------------------------------- leases

    def lease_possible(self, session: Session) -> bool:
        """Whether its slot table has room for one more lease beside all that may be granted."""
        return session.slots.free_leases > self.outstanding

    def release(self, session: Session, lease: int) -> None:
        session.slots.end(lease)
        session.holders.released(session.client)
        engine = self._daemon.engine
        engine.submit(Release(engine.now(), session.client, lease))

    def release_orphan(self, session: Session, lease: int) -> bool:
        return self.orphans.release(session.process, lease)

    def _orphan_ended(self, lease: int) -> None:
        self._daemon.slots.end(lease)
        engine = self._daemon.engine
        engine.submit(HolderGone(engine.now(), lease))

    # ----------------------------------------------------------------------------------------- end

    async def see_off(self) -> None:
        """Refuse what still waits, let everybody read that, and close the connections."""
        self.stopping = True
        for session in list(self._connected.values()):
            session.shut_down()
        self._check_all_left()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_left.wait(), DRAIN_SECONDS)
        for session in list(self._connected.values()):
            session.connection.close("tierd is shutting down")
        self.orphans.close()

    def _check_all_left(self) -> None:
        if self.stopping and not self._connected:
            self._all_left.set()
