"""What every test may rely on."""

from __future__ import annotations

import signal

# A job in the background of a shell without job control ignores SIGINT, and so would we and every
# process that the tests start. As in a terminal, an interrupt interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)
