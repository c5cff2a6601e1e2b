"""fio, the measure of what a disk gives: one sequential read of a file with O_DIRECT."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def read_rate(file: Path, chunk_bytes: int, in_flight: int, memory: str) -> float:
    """Bytes per second of the whole `file`, with `in_flight` chunks on their way at any time.

    memory: a file of `in_flight * chunk_bytes` that fio maps and reads into. Its pages are fio's.
    """
    argv = ["fio", "--name=read", f"--filename={file}", "--rw=read", "--direct=1", "--thread"]
    argv += [f"--bs={chunk_bytes}", "--ioengine=libaio", f"--iodepth={in_flight}"]
    argv += [
        f"--iomem=mmapshared:{memory}",
        f"--size={file.stat().st_size // chunk_bytes * chunk_bytes}",
    ]
    argv += ["--output-format=json"]
    out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return float(json.loads(out[out.index("{") :])["jobs"][0]["read"]["bw_bytes"])
