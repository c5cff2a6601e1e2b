"""What binds the kernels: do they use up the memory's throughput, the issue slots, or neither?

By the hardware counters that ncu reads; ours are issue slots, theirs the throughput of DRAM, both
in percent of what the card can do. The kernels run as they are taken where nothing was measured.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from tierd_tools import cuda_tools, profiler
from tierd_tools.gpu_acceptance.promises import PROFILE
from tierd_tools.gpu_ground import ground
from tierd_tools.gpu_profiled import KERNELS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd_tools.benchmark import Row

PROGRAM: Final = ("-m", "tierd_tools.gpu_profiled")
SECONDS: Final = 60.0
"""Unless TIERD_PART_SECONDS says otherwise."""


def run(program: Sequence[str] = PROGRAM) -> list[Row]:
    here = ground()
    problem = here.problem or here.but
    tool = cuda_tools.find(profiler.NAME)
    if problem is None and tool is None:
        problem = f"no {profiler.NAME} {cuda_tools.LOOKED_IN}"
    if problem is not None or tool is None:
        return [promise.not_run(str(problem)) for promise in PROFILE]
    seconds = float(os.environ.get("TIERD_PART_SECONDS", SECONDS))
    try:
        found = profiler.profile(tool, program, KERNELS, max(seconds - 2, 1))
    except profiler.ProfilerFailed as error:
        return [promise.not_run(str(error)) for promise in PROFILE]
    if len(found) != len(PROFILE):
        names = ", ".join(one.kernel for one in found)
        why = f"{tool} saw {len(found)} launches, {len(PROFILE)} were made: {names}"
        return [promise.not_run(why) for promise in PROFILE]
    return [
        promise.measured(one.issue, one.dram, binds=one.binds)
        for promise, one in zip(PROFILE, found, strict=True)
    ]
