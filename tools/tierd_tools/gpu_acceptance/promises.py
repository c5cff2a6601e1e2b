"""The rows that a node with a GPU must show, by the benchmark that measures them.

Here, and not in the benchmarks, so that a row is printed also when its benchmark could not run.
Imports nothing but the standard library: the acceptance begins before anything is built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tierd_tools.benchmark import Row


@dataclass(frozen=True, slots=True)
class Promise:
    """A row without its figures."""

    row: str
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    def measured(
        self, ours: float | None, theirs: float | None, but: str | None = None, beside: str = ""
    ) -> Row:
        """but: why these figures do not count. beside: what else was measured, for the reader."""
        return Row(
            self.row + (f" ({beside})" if beside else ""), ours, theirs, self.unit,
            self.at_least, self.at_most, not_applicable=but,
        )  # fmt: skip

    def not_run(self, reason: str) -> Row:
        return self.measured(None, None, reason)


COPY: Final = (
    Promise("layers copied for a client, against one large pinned copy", "GB/s", at_least=0.95),
)
ACQUIRE: Final = tuple(
    Promise(f"acquire, resident on the GPU against in DRAM, {clients}, {point}", "us", at_most=1.1)
    for clients in ("1 client", "4 clients")
    for point in ("p50", "p99")
)
TOKEN: Final = (
    Promise(
        "time per token less expanding, all resident, dense, against torch eager", "ms",
        at_most=1.10,
    ),
    Promise("time per token with expanding, all resident, dense, against torch eager", "ms"),
    Promise("tokens as the model in memory gives them", "share", at_least=1.0),
)  # fmt: skip
SHARED: Final = tuple(
    Promise(f"{what}, {count} processes against 1", unit, at_most=1.05)
    for count in (2, 4)
    for what, unit in (("weight arenas in VRAM", "MiB"), ("bytes read from the SSD", "MiB"))
)
BESIDE: Final = tuple(
    Promise(f"VRAM of {count} processes: contexts, KV and scratch, against 1", "MiB")
    for count in (2, 4)
)
KILLED: Final = (
    Promise("slots of a killed client are reused, against the bound", "s", at_most=1.0),
    Promise("logits of others beside the kill, equal to before", "share", at_least=1.0),
)
MEMORY: Final = (
    Promise("the daemon's own memory with a GPU, against without one", "MB"),
    Promise("READY with a GPU configured, against without one", "s"),
)

#: In the order in which they run: what bounds most comes first, should time run out.
PROMISES: Final[dict[str, tuple[Promise, ...]]] = {
    "gpu_copy": COPY,
    "gpu_acquire": ACQUIRE,
    "gpu_killed": KILLED,
    "gpu_token": TOKEN,
    "gpu_shared": (*SHARED, *BESIDE),
    "gpu_memory": MEMORY,
}
