"""One life of tierd: what it takes at the start, whom it lets in, how it ends.

This is the only task boundary. A fault while answering one client ends that connection. A fault of
the core, the slot table or the arenas ends the daemon: what it believes about its memory could be
wrong, and systemd starts one that looks again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import time
from typing import TYPE_CHECKING, Any

from tierd import recovery, sdnotify
from tierd.arenas import Arenas
from tierd.core.errors import CoreError, IllegalEvent
from tierd.core.model import Adopted, ArenaAdded, ClientGone, ClientJoined, CoreConfig, Release
from tierd.engine import Engine
from tierd.errors import ShuttingDown, TierdError, TooManyClients
from tierd.io.memory_limits import auto_budget, available_bytes, check_budget
from tierd.io.pages import choose_pages
from tierd.io.ssd import ReaderPool
from tierd.models import Models, scan_for
from tierd.recovery import HolderGoneReporter, Orphans
from tierd.registry import Registry
from tierd.server import Listener
from tierd.session import MAX_OUTSTANDING, Session
from tierd.sizes import format_size
from tierd.slots import Slots
from tierd.statistics import Statistics
from tierd.watchdog import Watchdog
