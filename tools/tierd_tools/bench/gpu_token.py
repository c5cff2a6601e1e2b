"""With all layers resident on the GPU: is a token as fast as with the model in memory?

Less the time of expanding, which the next issue makes fast; both figures are printed. Two
processes, one for each side, take turns.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from tierd_tools.gpu_acceptance.promises import TOKEN
from tierd_tools.gpu_ground import Ground, ground, models
from tierd_tools.gpu_process import ModelProcess

if TYPE_CHECKING:
    from pathlib import Path

    from tierd_tools.benchmark import Row

TOKENS, ROUNDS = 16, 5


def run() -> list[Row]:
    here = ground()
    if here.problem:
        return [promise.not_run(here.problem) for promise in TOKEN]
    folder = models()
    tierd, memory = ModelProcess(), ModelProcess()
    try:
        return _measure(here, folder, tierd, memory)
    finally:
        tierd.stop()
        memory.stop()


def _measure(here: Ground, folder: Path, tierd: ModelProcess, memory: ModelProcess) -> list[Row]:
    pack = folder / "packs" / "large"
    size = sum(file.stat().st_size for file in pack.iterdir()) * 5 // 4 + (64 << 20)
    memory.begin("load_in_memory", folder / "reference", here.where["device"])
    with here.serve(pack, str(size), str(size)) as daemon:
        tierd.call("load", "large", daemon.socket, here.where)
        memory.end()
        ours, expanding, theirs = [], [], []
        for number in range(ROUNDS + 1):
            tokens, seconds, expanded = tierd.call("generate", TOKENS)
            expected, other, _ = memory.call("generate", TOKENS)
            if number:  # the first is to warm up
                ours.append(seconds)
                expanding.append(expanded)
                theirs.append(other)
        same = tierd.call("logits", 2) == memory.call("logits", 2)
        tierd.call("close")
    mine, other = statistics.median(ours) * 1e3, statistics.median(theirs) * 1e3
    rest = mine - statistics.median(expanding) * 1e3
    equal = sum(a == b for a, b in zip(tokens, expected, strict=True)) / TOKENS
    return [
        TOKEN[0].measured(rest, other, here.but),
        TOKEN[1].measured(mine, other, here.but),
        TOKEN[2].measured(equal, 1.0, here.but),
        TOKEN[3].measured(float(same), 1.0, here.but),
    ]
