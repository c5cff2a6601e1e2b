"""`cuda.bindings.driver` of a process that has tests/fake_cuda/site on its PYTHONPATH.

FAKE_CUDA_GPUS and FAKE_CUDA_MEMORY_BYTES say what it has, FAKE_CUDA_FAULTS what fails while the
file named there first exists: "PATH cuMemCreate=2 cuMemcpyHtoDAsync=719". The file of
FAKE_CUDA_LOADED is made when this is imported.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

_root = str(Path(__file__).parents[5])
if _root not in sys.path:
    sys.path.append(_root)

FAKE = import_module("tests.fake_cuda.driver").FakeDriver(
    gpus=int(os.environ.get("FAKE_CUDA_GPUS", "1")),
    memory_bytes=int(os.environ.get("FAKE_CUDA_MEMORY_BYTES", str(1 << 30))),
)
if loaded := os.environ.get("FAKE_CUDA_LOADED"):
    Path(loaded).touch()
if faults := os.environ.get("FAKE_CUDA_FAULTS"):
    path, *pairs = faults.split()
    FAKE.fault_file = path
    FAKE.faults = {
        name: FAKE.CUresult(int(code)) for name, code in (pair.split("=") for pair in pairs)
    }
globals().update({name: getattr(FAKE, name) for name in dir(FAKE) if name.startswith(("cu", "CU"))})
