# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""A kernel that writes where it must not: a sanitizer that does not see it proves nothing.

python -m tierd_tools.gpu_planted
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def write_past(out, elements):
    """Write one element behind the array."""
    tl.store(out + elements + tl.program_id(0), 1.0)


def main() -> None:
    # A multiple of what allocations are rounded up to: behind it is nobody's memory.
    out = torch.zeros(1 << 19, dtype=torch.float32, device="cuda")
    write_past[(1,)](out, out.numel())
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
