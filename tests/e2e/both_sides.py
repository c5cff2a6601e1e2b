"""A daemon that serves packs, and the same models as torch has them in memory."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM

from tierd_client.client import Client
from tierd_client.errors import DaemonNotRunning

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def in_memory(folder: Path) -> Any:
    """The model with its weights where torch puts them: on 64 bytes.

    `from_pretrained` maps the file, where tensors lie on 8 bytes, and MKL's float32 product of one
    row sums in another order when a matrix is not on 16 bytes (bf16 and f16 products do not).
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@contextmanager
def daemon_of(packs: Path, dram: str) -> Iterator[str]:
    """A daemon that serves every pack in a folder; its socket."""
    socket = str(packs.parent / "tierd.sock")
    command = [sys.executable, "-m", "tierd", "--models", str(packs), "--dram", dram]
    command += ["--socket", socket, "--log-level", "warning"]
    process = subprocess.Popen(command)
    try:
        wait_for_daemon(socket, process)
        yield socket
    finally:
        process.terminate()
        assert process.wait(20) == 0


def wait_for_daemon(socket: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            Client(socket).close()
        except DaemonNotRunning:
            assert process.poll() is None, "the daemon ended before it served"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            return
