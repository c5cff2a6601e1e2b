"""The NVIDIA driver, without any CUDA package: is there a card, a driver, a library, do they start?

python -m tierd_tools.doctor.nvidia prints what libcuda says, as JSON: in a process of its own,
because a broken driver may hang or end whoever calls it.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tierd_tools.doctor.finding import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARY = "libcuda.so.1"
START_SECONDS = 30.0
_DRIVER_FILE = "proc/driver/nvidia/version"
_ERRORS = {
    100: "CUDA_ERROR_NO_DEVICE",
    101: "CUDA_ERROR_INVALID_DEVICE",
    802: "CUDA_ERROR_SYSTEM_NOT_READY: nvidia-fabricmanager does not run",
    803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: library and kernel module differ",
    804: "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
    999: "CUDA_ERROR_UNKNOWN",
}


@dataclass(frozen=True, slots=True)
class Started:
    """What libcuda said: cuInit's code, and how many GPUs it shows; or why it could not be asked.

    cuda: the version that the driver speaks, 13000 = 13.0.
    """

    gpus: int = 0
    cuda: int = 0
    code: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Nvidia:
    nodes: tuple[int, ...]  #: numbers N of /dev/nvidiaN
    module: str | None  #: version of the kernel module, None where none is loaded
    started: Started

    @property
    def problem(self) -> str | None:
        """Why nothing can run on a GPU here, None if it can."""
        if self.started.problem:
            return self.started.problem
        if self.started.code:
            name = _ERRORS.get(self.started.code, "see cuda.h")
            return f"cuInit failed with {self.started.code} ({name})"
        if self.started.gpus == 0:
            return "the driver shows no GPU"
        return None

    @property
    def present(self) -> bool:
        """Whether the machine has an NVIDIA card, usable or not."""
        return bool(self.nodes or self.module or self.started.gpus)


def look(root: Path = Path("/")) -> Nvidia:
    """root: where /dev and /proc are looked up (tests)."""
    nodes = [re.fullmatch(r"nvidia([0-9]+)", path.name) for path in (root / "dev").iterdir()]
    return Nvidia(
        nodes=tuple(sorted(int(match[1]) for match in nodes if match)),
        module=_module_version(root / _DRIVER_FILE),
        started=start(),
    )


def findings(found: Nvidia) -> Iterator[Finding]:
    problem = found.problem
    if problem is None:
        cuda = f"CUDA {found.started.cuda // 1000}.{found.started.cuda % 1000 // 10}"
        yield Finding(
            "NVIDIA driver", "works",
            f"{found.module or 'unknown version'}, {cuda}, {found.started.gpus} GPUs",
        )  # fmt: skip
        return
    if not found.present:
        yield Finding(
            "NVIDIA driver", "does not work", f"no NVIDIA GPU is visible here: {problem}",
            "on a node with a GPU: install its driver, and run containers with access to GPUs; "
            "without one, tierd serves DRAM",
        )  # fmt: skip
        return
    yield Finding(
        "NVIDIA driver", "does not work",
        f"{problem}; kernel module {found.module or 'not loaded'}, "
        f"{len(found.nodes)} device nodes",
        "nvidia-smi says what is missing; library and kernel module must be of one version",
        needed=True,
    )  # fmt: skip


def start() -> Started:
    """Load and initialise libcuda in another process."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tierd_tools.doctor.nvidia"],
            capture_output=True, text=True, timeout=START_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Started(problem=f"{LIBRARY} did not start within {START_SECONDS:g} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return Started(problem=f"{LIBRARY} ended its process with {done.returncode}: {last}")
    return Started(**json.loads(done.stdout.splitlines()[-1]))


def ask_library(library: str = LIBRARY) -> Started:
    """In this process."""
    try:
        cuda = ctypes.CDLL(library)
    except OSError as error:
        return Started(problem=f"{error}")
    if code := cuda.cuInit(0):
        return Started(code=code)
    version, count = ctypes.c_int(), ctypes.c_int()
    code = cuda.cuDriverGetVersion(ctypes.byref(version))
    code = code or cuda.cuDeviceGetCount(ctypes.byref(count))
    return Started(gpus=count.value, cuda=version.value, code=code)


def _module_version(path: Path) -> str | None:
    try:
        text = path.read_text()
    except OSError:
        return None
    match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)*)\s", text)
    return match[1] if match else "of unknown version"


if __name__ == "__main__":
    print(json.dumps(asdict(ask_library())))
