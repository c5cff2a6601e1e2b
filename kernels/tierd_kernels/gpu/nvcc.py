"""`product.cu` compiled ahead by nvcc, where there is one: for what can be known without a GPU.

On a GPU NVRTC compiles it, through CuPy: `cuda_product.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final, Literal

from tierd_kernels.errors import KernelError
from tierd_kernels.gpu.cuda_product import SOURCE

COMPILER: Final = "nvcc"


def found() -> bool:
    """Whether there is an nvcc."""
    return shutil.which(COMPILER) is not None


def compiled(options: tuple[str, ...], architecture: int, form: Literal["cubin", "ptx"]) -> bytes:
    """The kernel for an architecture (80, 90, 100). Raises KernelError."""
    if not found():
        raise KernelError(f"{SOURCE.name} is not compiled: there is no {COMPILER}")
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / SOURCE.stem
        target = (f"-arch=sm_{architecture}", f"-{form}", "-o", str(to))
        command = [COMPILER, "--Werror", "all-warnings", *options, *target, str(SOURCE)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            said = (run.stderr or run.stdout).strip()
            raise KernelError(f"{COMPILER} does not compile {SOURCE.name}: {said[:1000]}")
        return to.read_bytes()
