"""The thread beside a loaded model: it gives back what others need, also while the model idles."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from tierd_client.errors import ClientClosed, DaemonGone, TierdError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_client.leasing import LayerLeases

#: Others wait this long at most for what is kept here.
PERIOD_S = 0.05
#: A model in DRAM that was not used for so long keeps nothing: the daemon counts who holds several
#: leases among those who share the processors.
QUIET_S = 2.0
#: How long an end waits for the thread, which may be inside a call to the daemon.
END_S = 1.0


class Attendant:
    """Starts the thread; `stop` ends it. It dies with the process, and is not there in a fork.

    scratch_bytes: how much memory of a GPU the model uses for itself.
    """

    def __init__(self, leases: LayerLeases, scratch_bytes: Callable[[], int] = int) -> None:
        self._leases = leases
        self._scratch_bytes = scratch_bytes
        if leases.opened.arenas is not None:
            leases.opened.arenas.attended = True
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
            try:
                self._tend()
            except (DaemonGone, ClientClosed):
                break  # whoever computes is told; there is nobody to give anything back to
            except TierdError:
                continue  # no answer in time, for example: again at the next turn
        self._stopping.wait()
        if self._afterwards is not None:
            self._afterwards()

    def _tend(self) -> None:
        opened = self._leases.opened
        opened.look()
        if opened.arenas is None:
            self._leases.tend(QUIET_S)
        else:
            self._leases.tend()
            opened.connection.departures.send()
            opened.arenas.attend(opened.table.attention, self._scratch_bytes())
