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
    invert: bool = False  #: as of a Row: the ratio is theirs / ours

    def measured(
        self,
        ours: float | None,
        theirs: float | None,
        but: str | None = None,
        beside: str = "",
        binds: str | None = None,
    ) -> Row:
        """but: why these figures do not count. beside: what else was measured, for the reader."""
        return Row(
            self.row + (f" ({beside})" if beside else ""), ours, theirs, self.unit,
            self.at_least, self.at_most, but, self.invert, binds,
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
    Promise("logits as the model in memory gives them, bit for bit", "share", at_least=1.0),
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

_SHAPES: Final = ("8192x8192", "28672x8192")
EXPAND: Final = tuple(
    Promise(
        f"expand {codec} 50 %, {shape}, bytes read and written, against a copy", "GB/s",
        at_least=bound,
    )
    for shape in _SHAPES
    for codec, bound in (("raw", 0.7), ("exponent-packed", 0.6), ("int8", None), ("int4", None))
)  # fmt: skip
FUSED_FORMS: Final = (
    *(("raw", 0.5, 1.2), ("exponent-packed", 0.5, 1.2)),
    *(("raw", 0.7, 1.7), ("exponent-packed", 0.7, 1.7)),
    *(("int8", 0.5, 1.5), ("int4", 0.5, 1.8)),
)
"""(codec, zeros, times as fast as cuBLAS with dense bf16 weights)"""
FUSED: Final = tuple(
    Promise(
        f"fused {codec} {zeros:.0%}, {shape}, the worst of 1 to 16 tokens, against cuBLAS bf16",
        "us", at_least=bound, invert=True,
    )
    for shape in _SHAPES
    for codec, zeros, bound in FUSED_FORMS
)  # fmt: skip
ERROR: Final = (
    *(
        Promise(f"fused {codec}: RMS error of the float32 result, against 1e-5", "relative",
                at_most=1.0)
        for codec in ("raw", "exponent-packed", "int8", "int4")
    ),
    *(
        Promise(f"fused {codec}: RMS error of the bf16 result, against cuBLAS's", "relative",
                at_most=1.05)
        for codec in ("raw", "exponent-packed")
    ),
)  # fmt: skip
DECODE_VRAM: Final = (
    Promise("decode, pack 2x the VRAM budget, from pinned DRAM, against Accelerate cpu_offload",
            "s/token", at_least=4.0, invert=True),
    Promise("the same against Accelerate with a device map of the same budgets", "s/token",
            invert=True),
)  # fmt: skip
DECODE_SSD: Final = (
    Promise("decode, pack 2x the DRAM budget, from the SSD, against Accelerate disk_offload",
            "s/token", at_least=4.0, invert=True),
    Promise("the same against Accelerate with a device map of the same budgets ", "s/token",
            invert=True),
)  # fmt: skip
LAYOUT: Final = tuple(
    Promise(f"{what} raw 50 %, 8192x8192, as on disk against the fastest other order", "us",
            at_most=1.15)
    for what in ("expand", "decode and sum")
)  # fmt: skip
VARIANTS: Final = tuple(
    Promise(f"{codec} {shape}: fused is faster up to so many tokens, of 64", "tokens")
    for shape in _SHAPES
    for codec in ("raw", "exponent-packed", "int8", "int4")
)
PROFILE: Final = tuple(
    Promise(f"issue slots in use, {way} {codec} 50 %, 8192x8192, 1 token, against DRAM's", "%")
    for way, codec in (
        *(("expand", "raw"), ("expand", "exponent-packed")),
        *(("fused", "raw"), ("fused", "exponent-packed"), ("fused", "int8"), ("fused", "int4")),
    )
)
"""Of the launches of `tierd_tools.gpu_profiled`, in its order."""
SANITIZER: Final = (
    Promise("compute-sanitizer memcheck: errors in the kernels' tests, against a planted one",
            "errors", at_most=0.0),
)  # fmt: skip

#: In the order in which they run: what bounds most comes first, should time run out.
PROMISES: Final[dict[str, tuple[Promise, ...]]] = {
    "gpu_error": ERROR,
    "gpu_expand": EXPAND,
    "gpu_variants": VARIANTS,
    "gpu_fused": FUSED,
    "gpu_decode": (*DECODE_VRAM, *DECODE_SSD),
    "gpu_copy": COPY,
    "gpu_acquire": ACQUIRE,
    "gpu_killed": KILLED,
    "gpu_token": TOKEN,
    "gpu_layout": LAYOUT,
    "gpu_profile": PROFILE,
    "gpu_sanitizer": SANITIZER,
    "gpu_shared": (*SHARED, *BESIDE),
    "gpu_memory": MEMORY,
}
