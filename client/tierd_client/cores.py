"""Which threads a kernel takes: torch's own, and of the processors this process's share."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

import tierd_kernels
from tierd_kernels.cpu import MAX_THREADS
from tierd_kernels.cpus import default_threads

_team = 0
"""Threads of the team that the kernels were told of."""


def kernel_threads(holders: int) -> int:
    """Threads of one kernel while `holders` processes work with leases (0: nobody knows).

    At most `torch.get_num_threads()`, and at most an equal share of the processors, rounded up: all
    of them for one process, and never much more than there are for all processes together. The
    kernels run on torch's threads: those spin for milliseconds after each product, and workers of
    the kernels' own would get no processor meanwhile.
    """
    global _team
    team = min(torch.get_num_threads(), MAX_THREADS)
    if team != _team:
        tierd_kernels.share_threads(openmp(), team)
        _team = team
    share = -(-processors() // max(holders, 1))
    return max(1, min(team, share))


@cache
def processors() -> int:
    """Processors that this process may use: its affinity and the CPU quotas around it."""
    return default_threads()


@cache
def openmp() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that torch was linked with; 0 if it has none
    (then the kernels' own threads do the work)."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        # Loaded already: a symbol is looked for in it and in what it was linked with.
        function = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0
