"""The probe of reads past DRAM: a device of tierd's own, filled from a file by its own reader."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import xxhash

from tierd.errors import ReadError
from tierd.gpu.errors import DeviceUnavailable
from tierd.gpu.kinds import make_device
from tierd.gpu_settings import played_library
from tierd.io.cufile import CuFileReader, DirectJob
from tierd.io.cufile_library import CuFileLibrary, GpuDirectUnavailable
from tierd.io.ssd_job import ExtentRead
from tierd_layouts.records import BLOCK_BYTES

if TYPE_CHECKING:
    from tests.gpu.talk import Talk
    from tierd.gpu.device import Kind

CHUNK_BYTES = 2 << 20
OFFSET = 4096  # in the first chunk: so a read ends at the border of each
TIMES = 5


def direct_read(talk: Talk, kind: str, file: str) -> None:
    """Reads a file into chunks a few times, and says what cuFile counted; or why it does not."""
    content = Path(file).read_bytes()
    count = -(-(OFFSET + len(content)) // CHUNK_BYTES)
    device = make_device(cast("Kind", kind), 0, CHUNK_BYTES, (count + 1) * CHUNK_BYTES, direct=True)
    reader = CuFileReader(CuFileLibrary(played_library()))
    try:
        device.open()
        device.enter()
        reader.open()
    except (DeviceUnavailable, GpuDirectUnavailable) as error:
        talk.say({"refused": str(error)})
        return
    device.add_arena(0, device.span_bytes((count + 1) * CHUNK_BYTES))
    device.back(0, 0, count)
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)
    starts = range(0, len(content), BLOCK_BYTES)
    hashes = tuple(xxhash.xxh3_64_intdigest(content[at : at + BLOCK_BYTES]) for at in starts)
    extent = ExtentRead(fd, file, 0, len(content), hashes)
    parts = tuple(device.parts(0, OFFSET, len(content)))
    job = DirectJob("probe", "layer", (extent,), parts, device.fetch)
    read_s, verify_s = [], []
    try:
        for _ in range(TIMES):
            begin = time.perf_counter()
            reader.read(job)
            middle = time.perf_counter()
            reader.verify(job)
            read_s.append(middle - begin)
            verify_s.append(time.perf_counter() - middle)
    except ReadError as error:
        talk.say({"refused": str(error)})
        return
    counted = reader.statistics()
    reader.close()
    device.close()
    talk.say(
        {
            "direct_reads": counted.direct_reads,
            "posix_reads": counted.posix_reads,
            "read_gb_s": round(len(content) / min(read_s) / 1e9, 2),
            "verify_gb_s": round(len(content) / min(verify_s) / 1e9, 2),
        }
    )
