"""ncu: what it counts of the kernels that a program launches."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NAME: Final = "ncu"
#: of ncu, by what they are called here
METRICS: Final = {
    "us": "gpu__time_duration.sum",
    "dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "l1": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "registers": "launch__registers_per_thread",
}


@dataclass(frozen=True, slots=True)
class Profile:
    """One launch of a kernel. dram, issue, l1, warps: percent of what the GPU can do: of its
    memory's throughput, issue slots, L1 throughput, resident warps."""

    kernel: str
    us: float
    dram: float
    issue: float
    l1: float
    warps: float
    instructions: float
    registers: float

    @property
    def binds(self) -> str:
        most, what = max((self.dram, "bytes"), (self.issue, "issue slots"), (self.l1, "L1"))
        by = what if most >= 70 else f"latency (nothing is above 70 %; {what} come first)"
        return (
            f"{by}: DRAM {self.dram:.0f} %, issue slots {self.issue:.0f} %, L1 {self.l1:.0f} %, "
            f"warps {self.warps:.0f} % of the most, {self.registers:.0f} registers, "
            f"{self.instructions / 1e6:.1f} M warp instructions in {self.us:.1f} us"
        )


class ProfilerFailed(RuntimeError):
    """It ended with an error, or saw no kernel; the text has its last words."""


def profile(tool: Path, command: Sequence[str], kernels: str, seconds: float) -> list[Profile]:
    """The launches of kernels whose names match `kernels` by `python COMMAND`, in their order.

    The card's clocks are left as they are. Raises ProfilerFailed.
    """
    argv = [
        str(tool), "--clock-control", "none", "--target-processes", "all", "--csv",
        "--page", "raw", "--print-units", "base", "--kernel-name", f"regex:{kernels}",
        "--metrics", ",".join(METRICS.values()), sys.executable, *command,
    ]  # fmt: skip
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise ProfilerFailed(f"{tool} did not end within {seconds:.0f} s") from None
    found = read(done.stdout)
    if done.returncode or not found:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        last = said[-1] if said else "nothing"
        raise ProfilerFailed(f"{tool} ended with {done.returncode} and said: {last}")
    return found


def read(output: str) -> list[Profile]:
    """Of the lines of CSV among what ncu and the program said; the first after the heading has
    units."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    found = []
    for record in csv.DictReader(lines):
        if not record["ID"]:
            continue
        values = {name: float(record[of].replace(",", "")) for name, of in METRICS.items()}
        values["us"] /= 1e3  # base units: ns
        found.append(Profile(record["Kernel Name"], **values))
    return found
