"""How many threads a kernel takes: this process's share of the processors."""

from __future__ import annotations

from functools import cache

import torch

from tierd_kernels.cpu import MAX_THREADS
from tierd_kernels.cpus import default_threads


@cache
def processors() -> int:
    """Processors that this process may use: its affinity and the CPU quotas around it."""
    return default_threads()


def kernel_threads(holders: int) -> int:
    """Threads of one kernel while `holders` processes work with leases (0: nobody knows).

    At most `torch.get_num_threads()`, and at most an equal share of the processors, rounded up: all
    of them for one process, and never much more than there are for all processes together.
    """
    share = -(-processors() // max(holders, 1))
    return max(1, min(torch.get_num_threads(), share, MAX_THREADS))
