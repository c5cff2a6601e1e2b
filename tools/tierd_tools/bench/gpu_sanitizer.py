"""Is compute-sanitizer clean over the kernels' tests, hostile contents among them?

First it has to find the write of `gpu_planted`, which is wrong on purpose.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Final

from tierd_tools import cuda_tools, sanitizer
from tierd_tools.gpu_acceptance.promises import SANITIZER
from tierd_tools.gpu_ground import ground

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd_tools.benchmark import Row

PLANTED: Final = ("-m", "tierd_tools.gpu_planted")
TESTS: Final = (
    *("-m", "pytest", "-m", "gpu", "tests/kernels/gpu", "-q", "-x", "-p", "no:cacheprovider"),
    *("-p", "pytest_asyncio.plugin", "-p", "pytest_timeout", "-o", "timeout=0"),
)
ENVIRON: Final = {"TIERD_KERNELS_DEVICE": "cuda", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
SECONDS: Final = 90.0
"""For both, unless TIERD_PART_SECONDS says otherwise."""


def run(planted: Sequence[str] = PLANTED, tests: Sequence[str] = TESTS) -> list[Row]:
    (promise,) = SANITIZER
    here = ground()
    if here.problem:
        return [promise.not_run(here.problem)]
    tool = cuda_tools.find(sanitizer.NAME)
    if tool is None:
        return [promise.not_run(f"no {sanitizer.NAME} {cuda_tools.LOOKED_IN}")]
    seconds = float(os.environ.get("TIERD_PART_SECONDS", SECONDS))
    begin = time.monotonic()
    wrong = sanitizer.memcheck(tool, planted, seconds / 2)
    if not wrong.errors:
        last = (wrong.output.strip().splitlines() or ["nothing"])[-1]
        return [promise.not_run(f"{tool} finds no planted error here; it said: {last}")]
    left = seconds - (time.monotonic() - begin)
    found = sanitizer.memcheck(tool, tests, max(left - 2, 1), ENVIRON)
    return [
        promise.measured(
            found.errors, wrong.errors, here.but or _unfinished(found, left), found.first
        )
    ]


def _unfinished(found: sanitizer.Found, seconds: float) -> str | None:
    """Why a run without errors says nothing."""
    if found.errors:
        return None
    if found.status is None:
        return f"the tests did not end within {seconds:.0f} s; no error until then"
    if found.status:
        last = (found.output.strip().splitlines() or ["nothing"])[-1]
        return f"the tests ended with {found.status} under it: {last}"
    return None if found.watched else "it wrote no summary"
