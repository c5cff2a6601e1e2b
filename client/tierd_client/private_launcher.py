"""Runs inside a private daemon's process: `tierd`, plus a watch that ends it with its parent.

A script, not a module to import. PR_SET_PDEATHSIG would fire when the *thread* that started the
daemon ends, and a pipe would be held open by a forked child of the parent; a pidfd is exact.
"""

import os
import runpy
import select
import signal
import sys
import threading

GRACE_S = 5.0


def end_with(parent: int) -> None:
    """Stop this process when `parent` is gone: politely, then for certain."""
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        pidfd = None
    if pidfd is None or os.getppid() != parent:  # gone before we looked; the number may be reused
        sys.exit("tierd: the process that started this private daemon is gone")

    def watch() -> None:
        select.select([pidfd], [], [])
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(GRACE_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


if __name__ == "__main__":
    end_with(int(sys.argv[1]))
    sys.argv = ["tierd", *sys.argv[2:]]
    runpy.run_module("tierd", run_name="__main__", alter_sys=True)
