"""Do the kernels of models on GPUs compile and compute here? They are Triton's.

python -m tierd_tools.doctor.kernels prints one JSON line: in a process of its own, because CUDA may
hang or end whoever calls it. It expands a small matrix, multiplies with it, and compares both with
what the CPU makes of it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from typing import Any, Final

from tierd_tools.doctor.finding import Finding

NAME: Final = "GPU kernels (Triton)"
LONGEST_SECONDS: Final = 90.0
_COMPILERS: Final = ("gcc", "clang", "cc")
ROWS, COLS, TOKENS = 64, 128, 2


def finding(*, present: bool) -> Finding:
    """present: whether there is a GPU. Clients may run in another environment than this one, so
    nothing here is needed."""
    version = _triton()
    if version is None:
        return Finding(
            NAME, "does not work", "Triton is not installed in this environment",
            "pip install triton==3.6.0, where models are to run on GPUs",
        )  # fmt: skip
    if _compiler() is None:
        return Finding(
            NAME, "does not work",
            f"Triton {version} builds what launches its kernels with a C compiler, and none of "
            f"{', '.join(_COMPILERS)} is on PATH",
            "install gcc, or name a compiler in CC",
        )  # fmt: skip
    if not present:
        return Finding(NAME, "unknown", f"Triton {version} is here, and no GPU to compile for")
    command = [sys.executable, "-m", "tierd_tools.doctor.kernels"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    except subprocess.TimeoutExpired:
        return Finding(NAME, "does not work", f"no answer within {LONGEST_SECONDS:g} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Finding(
            NAME, "does not work", f"the trial process ended with {done.returncode}: {said}",
            f"run `{' '.join(command[1:])}` with {sys.executable} for the whole text",
        )  # fmt: skip
    said = json.loads(lines[-1])
    return Finding(NAME, "works" if said["works"] else "does not work", said["text"])


def try_out(device: str) -> dict[str, Any]:
    """{works, text}. Raises what torch, Triton and the driver raise."""
    import torch

    from tierd_kernels import torch_matrix
    from tierd_kernels.gpu.expand import expand
    from tierd_kernels.gpu.linear import linear
    from tierd_tools import matrix_set

    dense = matrix_set.random_dense(ROWS, COLS, 0.5)
    x = torch.randn(TOKENS, COLS).to(torch.bfloat16)
    begin = time.monotonic()
    for codec in ("raw", "exponent-packed"):
        matrix = torch_matrix.from_arrays(matrix_set.pack(dense, codec), device)
        out = torch.full((ROWS, COLS), 7.0, dtype=torch.bfloat16, device=device)
        expand(matrix, out)
        if not torch.equal(out.cpu(), dense):
            return {"works": False, "text": f"a {codec} matrix was expanded to another one"}
        found = linear(matrix, x.to(device), out=torch.empty((TOKENS, ROWS), device=device))
        exact = x.double() @ dense.double().T
        error = float((found.cpu().double() - exact).abs().max() / exact.abs().max())
        if not error < 1e-5:
            return {"works": False, "text": f"a product with a {codec} matrix is {error:.1e} off"}
    return {
        "works": True,
        "text": f"Triton {_triton()}: a matrix was expanded and multiplied as on the CPU; "
        f"{time.monotonic() - begin:.1f} s with compiling",
    }


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    named = os.environ.get("CC")
    return next(filter(None, map(shutil.which, [named] if named else _COMPILERS)), None)


if __name__ == "__main__":
    print(json.dumps(try_out("cuda")))
