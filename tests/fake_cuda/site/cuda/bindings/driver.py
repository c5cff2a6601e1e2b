"""`cuda.bindings.driver` of a process that has tests/fake_cuda/site on its PYTHONPATH.

FAKE_CUDA_GPUS and FAKE_CUDA_MEMORY_BYTES say what it has.
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
globals().update({name: getattr(FAKE, name) for name in dir(FAKE) if name.startswith(("cu", "CU"))})
