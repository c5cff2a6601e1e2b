"""A client of one daemon: opens models and leases layers."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any, Self

from tierd_client import orphans
from tierd_client.connection import Connection
from tierd_client.device import GpuDevice, check_tier, place
from tierd_client.errors import (
    LeaseLost,
    ModelNotFound,
    ProtocolBroken,
    TierUnavailable,
    VersionMismatch,
    ViewStillAlive,
)
from tierd_client.opened import OpenedModel
from tierd_client.statistics import ClientStatistics, Counters
from tierd_layouts.errors import NameRefused
from tierd_layouts.names import check_model_name
from tierd_layouts.wire import (
    DRAM_TIER,
    GPU_CAPABILITY,
    PROTOCOL_VERSION,
    ErrorCode,
    resolve_socket,
)

if TYPE_CHECKING:
    from types import TracebackType

    from tierd_client.gpu.arenas import GpuArenas
    from tierd_client.lease import Lease

DEFAULT_TIMEOUT_S = 60.0
LONGEST_TIMEOUT_S = 1_000_000


class Client:
    """A connection to tierd, for all threads of this process; not for a forked child.

    socket: the daemon's path, else $TIERD_SOCKET, else /run/tierd/tierd.sock, else
    $XDG_RUNTIME_DIR/tierd.sock. tier: what its leases are of, "dram" or "gpu:N". name: what
    `tierctl clients` shows. timeout: seconds to wait for any one answer. Raises DaemonNotRunning,
    DaemonTimeout, VersionMismatch, TooManyClients, TierUnavailable; ValueError for a socket "" and
    a timeout of 0 or above LONGEST_TIMEOUT_S.

    On a GPU tier a client that idles calls `attend` now and then (`load_model` does).
    """

    def __init__(
        self,
        socket: str | None = None,
        *,
        tier: str = DRAM_TIER,
        name: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        if not 0 < timeout <= LONGEST_TIMEOUT_S:
            raise ValueError(
                f"timeout is {timeout} s, expected more than 0 and at most {LONGEST_TIMEOUT_S}"
            )
        path = resolve_socket(socket, for_listening=False)
        self._connection = Connection.connect(path, timeout, check_tier(tier))
        self._counters = Counters()
        self._opening = threading.Lock()
        self._opened: dict[str, OpenedModel] = {}
        self._arenas: GpuArenas | None = None
        try:
            self._hello(name or _process_name())
        except BaseException:
            self._connection.close()
            raise

    def __repr__(self) -> str:
        return f"<Client of {self.socket}>"

    @property
    def socket(self) -> str:
        """Path of the daemon's socket."""
        return self._connection.path

    @property
    def tier(self) -> str:
        """What its leases are of."""
        return self._connection.tier

    def open(self, model: str) -> OpenedModel:
        """The model called `model`; the same object again when it is open already.

        Raises ModelNotFound, AccessDenied, PackInvalid, DaemonGone; UnsupportedDevice and
        DeviceFailed for a GPU that this process does not see or cannot map.
        """
        self._connection.check()
        try:
            check_model_name(model)
        except NameRefused as error:
            raise ModelNotFound(f"no model can have that name: {error}", "not_found") from error
        with self._opening:
            opened = self._opened.get(model)
            if opened is None or opened.closed:
                arenas = self._gpu_arenas()
                reply = self._connection.call("open", model=model)
                opened = OpenedModel(
                    model,
                    self._connection,
                    self._counters,
                    self.epoch,
                    reply,
                    may_keep=GPU_CAPABILITY in self.capabilities,
                    arenas=arenas,
                )
                self._opened[model] = opened
            return opened

    def lease(self, model: str, layer: str | int) -> Lease:
        """A lease of one layer by name or number, opening the model on demand; use it as a context.

        Raises what `open` and `OpenedModel.acquire` raise.
        """
        return self.open(model).acquire(layer)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """The reply fields of a diagnostic request (status, models, layers, clients, config)."""
        return self._connection.call(op, **fields).fields

    def attend(self, scratch_bytes: int = 0) -> None:
        """Let go of GPU memory that the daemon takes back; does nothing on DRAM. Acquiring does it
        too: call this every 50 ms or so where nothing is acquired.

        scratch_bytes: GPU memory that this client uses for itself, for `tierctl status`.
        """
        self._connection.check()
        if self._arenas is not None:
            self._connection.departures.send()
            for opened in list(self._opened.values())[:1]:  # all have the table of the tier
                self._arenas.attend(opened.table.attention, scratch_bytes)

    def statistics(self) -> ClientStatistics:
        """Totals since the client was made: leases, bytes, time waited."""
        return self._counters.snapshot()

    def close(self) -> None:
        """End the connection; the daemon frees what this client holds. Again does nothing.

        Ends every lease, and raises what their release would: ViewStillAlive, LeaseLost.
        """
        live = self._connection.live_leases()
        if self._arenas is not None and live:
            self._arenas.keep()  # a thread may be inside: its leases end, its memory stays
        problems = [lease.end(here=False) for lease in live]
        try:
            while self._connection.alive and self._connection.departures.wait():
                pass  # the daemon would take the memory while the GPU still reads it
        finally:
            self._connection.close()
        if self._arenas is not None and not self._connection.held:
            # Nobody gets the memory while it is mapped here. Not earlier: until the connection is
            # closed, another thread may be granted a lease.
            self._arenas.let_go()
        for problem in problems:
            if problem is not None:
                raise problem

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except (LeaseLost, ViewStillAlive) as problem:
            if error is None:
                raise
            error.add_note(f"{type(problem).__name__}: {problem}")

    def _gpu_arenas(self) -> GpuArenas | None:
        if self.gpu is not None and self._arenas is None:
            from tierd_client.gpu.arenas import GpuArenas

            self._arenas = GpuArenas(self._connection, place(self.gpu, self.tier, None))
        return self._arenas

    def _hello(self, name: str) -> None:
        asked: dict[str, Any] = {"version": PROTOCOL_VERSION, "client": name, "capabilities": []}
        if self.tier == DRAM_TIER:
            asked["held"] = orphans.leases(self._connection.path)
            self._connection.orphans.update(asked["held"])
        else:
            asked |= {"held": [], "tier": self.tier}
        fields = self._connection.call("hello", **asked).fields
        if fields.get("version") != PROTOCOL_VERSION:
            raise VersionMismatch(
                f"tierd at {self.socket} speaks protocol version {fields.get('version')!r}, this "
                f"client {PROTOCOL_VERSION}",
                "version_mismatch",
            )
        epoch = fields.get("epoch")
        if type(epoch) is not int:
            raise ProtocolBroken(f"hello reply with epoch {epoch!r}")
        #: Identity of the daemon's life.
        self.epoch = epoch
        #: The daemon's process id, version text and optional abilities, as it says.
        self.daemon_pid: int | None = fields.get("pid")
        self.daemon_version: str | None = fields.get("daemon_version")
        self.capabilities: tuple[str, ...] = tuple(fields.get("capabilities", ()))
        if fields.get("tier", DRAM_TIER) != self.tier:  # an older daemon
            raise TierUnavailable(
                f"tierd {self.daemon_version} at {self.socket} knows no tier {self.tier!r}: it "
                "serves DRAM only",
                ErrorCode.TIER_UNAVAILABLE,
            )
        #: What is behind a GPU tier; None for DRAM.
        self.gpu = None if self.tier == DRAM_TIER else GpuDevice.parse(fields.get("device"))


def _process_name() -> str:
    return f"{os.path.basename(sys.argv[0] or 'python')}[{os.getpid()}]"
