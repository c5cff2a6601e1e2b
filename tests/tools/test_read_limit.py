"""A limit on reads, on a real cgroup and disk where there are both."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tierd_tools.demo.memory_cap import CapUnavailable, MemoryCap
from tierd_tools.demo.read_limit import disk_of, limited_reads

MIB = 1 << 20
_READ = "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY)\nwhile os.read(fd, 1 << 20): pass"


def test_what_a_group_reads_is_slowed_and_the_group_goes_away(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    with file.open("wb") as output:
        output.write(os.urandom(4 * MIB))
        os.fsync(output.fileno())
        os.posix_fadvise(output.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        with (
            MemoryCap("tierd-test-reads", 256 * MIB) as group,
            limited_reads(group, tmp_path, 4 * MIB),
        ):
            begin = time.monotonic()
            argv = group.command([sys.executable, "-c", _READ, str(file)])
            subprocess.run(argv, check=True)
            seconds = time.monotonic() - begin
            joined = list(group.joined)
    except CapUnavailable as reason:
        pytest.skip(f"no limit on reads can be set: {reason}")
    assert seconds > 0.5, "4 MiB at 4 MiB/s; a lower bound, so another load cannot break it"
    assert not any(folder.exists() for folder in joined)


def test_what_lies_on_no_disk_is_refused() -> None:
    with pytest.raises(CapUnavailable, match="/proc is not on a block device"):
        disk_of(Path("/proc"))
