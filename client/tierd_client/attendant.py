"""The thread beside a loaded model: it gives back what others need, also while the model idles."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from tierd_client.errors import ClientClosed, DaemonGone

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_client.graphs import Graphs
    from tierd_client.leasing import LayerLeases

#: Others wait this long at most for what is kept here.
PERIOD_S = 0.05
#: A model in DRAM that was not used for so long keeps nothing: the daemon counts who holds several
#: leases among those who share the processors.
QUIET_S = 2.0
#: How long an end waits for the thread, which may be inside a call to the daemon.
END_S = 1.0

_log = logging.getLogger(__name__)


class Attendant:
    """Starts the thread; `stop` ends it. It dies with the process, and is not there in a fork.

    scratch_bytes: how much memory of a GPU the model uses for itself. graphs: they hold leases too.
    """

    def __init__(
        self,
        leases: LayerLeases,
        scratch_bytes: Callable[[], int] = int,
        graphs: Graphs | None = None,
    ) -> None:
        self._leases = leases
        self._graphs = graphs
        self._opened = leases.opened
        self._scratch_bytes = scratch_bytes
        self._lost = False
        self._complaint = ""
        if self._opened.arenas is not None:
            self._opened.arenas.attended = True
        self._stopping = threading.Event()
        self._afterwards: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="tierd-attendant", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self, end: Callable[[], None]) -> None:
        """Run `end`, which ends the connection too, and the thread.

        A model may be collected as garbage in the thread itself, with locks of its leases held:
        then `end` runs later, in that thread, with none.
        """
        if threading.current_thread() is self._thread:
            self._afterwards = end
            self._stopping.set()
            return
        self._stopping.set()
        try:
            end()
        finally:
            self._thread.join(END_S)

    def _run(self) -> None:
        while not self._stopping.wait(PERIOD_S):
            duties = (self._wind_up,) if self._lost else (self._look, self._tend, self._attend)
            for duty in duties:
                try:
                    duty()
                except (DaemonGone, ClientClosed):  # whoever computes is told
                    self._lost = not self._opened.connection.alive
                except Exception as error:
                    # No answer in time; or CUDA and mmap, which raise what they like. Others wait
                    # for the next turn.
                    self._complain(error)
        if self._afterwards is not None:
            self._afterwards()

    def _look(self) -> None:
        self._opened.look()

    def _tend(self) -> None:
        if self._graphs is not None:
            self._graphs.tend()
        self._leases.tend(QUIET_S if self._opened.arenas is None else None)
        self._opened.connection.departures.send()

    def _attend(self) -> None:
        if self._opened.arenas is not None:
            self._opened.arenas.attend(self._opened.table.attention, self._scratch_bytes())

    def _wind_up(self) -> None:
        """The daemon is gone. What it had on a GPU nobody gets while this process has it mapped."""
        if self._graphs is not None:
            self._graphs.drop()
        self._leases.abandon()
        connection = self._opened.connection
        connection.departures.send()
        if self._opened.arenas is not None and not connection.held:
            self._opened.arenas.let_go()

    def _complain(self, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if text != self._complaint:
            self._complaint = text
            _log.warning("%s: a turn of the attendant failed: %s", self._opened.name, text)
