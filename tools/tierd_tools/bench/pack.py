"""Does packing cost a core less time than its storage would deliver, and stay within its memory?

Input bytes of dense bf16 for each second that the process computed, threads and system calls
included: pruning, choosing, encoding, writing and the reading back at the end. So the rate of one
core, whatever the disk does; how long a run took is a row of its own. Each run is a new process.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierd_tools import pack_flow, random_model
from tierd_tools.benchmark import Row
from tierd_tools.checkpoint import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = Path("build/bench/pack")
ROUNDS = 3
PRUNED: Mapping[str, Any] = {"prune": "magnitude", "sparsity": 0.5}
#: what is packed -> (settings, MB/s for each core that are asked for)
RUNS: Mapping[str, tuple[Mapping[str, Any], float | None]] = {
    "raw, pruned to 50 %": ({"codec": "raw", **PRUNED}, 150.0),
    "lossless, pruned to 50 %": ({"codec": "lossless", **PRUNED}, 80.0),
    "lossless, not pruned": ({"codec": "lossless"}, 80.0),
    "int8, pruned to 50 %": ({"codec": "int8", **PRUNED}, None),
    "int4, pruned to 50 %": ({"codec": "int4", **PRUNED}, None),
}
#: Prints source bytes, CPU seconds, seconds, and the peak of memory above what the imports take.
PROGRAM = """
import json, sys, time
from tierd_tools import pack

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))

before, cpu = status("VmRSS"), time.process_time()
report = pack.pack(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))
spent = time.process_time() - cpu
print(json.dumps([report.source_bytes, spent, report.seconds, status("VmHWM") - before]))
"""


def run() -> list[Row]:
    model = FOLDER / "model"
    random_model.write(model, random_model.FULL)
    rates: dict[str, list[float]] = {what: [] for what in RUNS}
    walls: dict[str, list[float]] = {what: [] for what in RUNS}
    peaks: list[float] = []
    for _ in range(ROUNDS):  # the settings take turns, so that drift hits all of them
        for what, (settings, _) in RUNS.items():
            nbytes, cpu, seconds, peak = _pack(model, settings)
            rates[what].append(nbytes / cpu / 1e6)
            walls[what].append(nbytes / seconds / 1e6)
            peaks.append(peak)
    sizes = sorted(tensor.nbytes for tensor in Checkpoint.open(model).tensors.values())
    rows = [
        Row(
            f"{what}: input for each core, against what is asked",
            statistics.median(rates[what]),
            asked,
            "MB/s",
            at_least=None if asked is None else 1.0,
        )
        for what, (_, asked) in RUNS.items()
    ]
    rows += [
        Row(f"{what}: input, all cores and the disk", statistics.median(walls[what]), None, "MB/s")
        for what in RUNS
    ]
    bound = sum(sizes[-2:]) + pack_flow.SLACK_BYTES
    rows.append(
        Row(
            "peak of memory, against the two largest tensors and 1 GiB",
            max(peaks) / 1e6,
            bound / 1e6,
            "MB",
            at_most=1.0,
        )
    )
    return rows


def _pack(model: Path, settings: Mapping[str, Any]) -> tuple[float, float, float, float]:
    target = FOLDER / "packed"
    command = [sys.executable, "-c", PROGRAM, str(model), str(target), json.dumps(dict(settings))]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    shutil.rmtree(target)
    nbytes, cpu, seconds, peak = json.loads(out)
    return nbytes, cpu, seconds, peak
