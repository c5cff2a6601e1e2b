"""Does SSD to GPU without DRAM (cuFile) work here? It is a choice, off by default.

python -m tierd_tools.doctor.gpu_direct prints one JSON line: in a process of its own, because
cuFile starts threads, and may hang.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tierd.io.cufile_library import CuFileLibrary, GpuDirectUnavailable
from tierd_tools.doctor.finding import Finding

NAME = "SSD to GPU (cuFile)"
LONGEST_SECONDS = 20.0
_NOT_USED = "nothing is lost: unless gpu_direct is chosen, layers reach a GPU through DRAM"


def finding() -> Finding:
    command = [sys.executable, "-m", "tierd_tools.doctor.gpu_direct"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LONGEST_SECONDS,
            # cuFile writes a log into the working directory unless it is told where to.
            env={**os.environ, "CUFILE_LOGFILE_PATH": os.devnull},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        text = f"cuFile did not open within {LONGEST_SECONDS:g} s"
        return Finding(NAME, "does not work", text, _NOT_USED)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        text = f"the trial process ended with {done.returncode}"
        return Finding(NAME, "does not work", text, _NOT_USED)
    said = json.loads(lines[-1])
    if said["works"]:
        text = "the driver opens with compatibility mode off"
        return Finding(NAME, "works", text, "gpu_direct = true uses it")
    return Finding(NAME, "does not work", said["text"], f"{said['advice']}; {_NOT_USED}")


def main() -> None:
    library = CuFileLibrary()
    try:
        library.open()
    except GpuDirectUnavailable as error:
        print(json.dumps({"works": False, "text": error.reason, "advice": error.advice}))
        return
    print(json.dumps({"works": True}), flush=True)
    library.close()


if __name__ == "__main__":
    main()
