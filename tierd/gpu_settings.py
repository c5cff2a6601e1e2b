"""The settings of GPUs: how much of which one, in which chunks, and what goes with what."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.errors import ConfigError
from tierd.sizes import format_size, parse_size

if TYPE_CHECKING:
    from pathlib import Path

    from tierd.config import Config
    from tierd.gpu.device import Kind

DEVICES: tuple[Kind, ...] = ("cuda_vmm", "cuda_ipc", "memfd")
SMALLEST_CHUNK, LARGEST_CHUNK = 2 << 20, 1 << 30
LARGEST_AUTO_CHUNK = 64 << 20
AUTO_CHUNKS = 1024  #: a budget has at least so many chunks that `auto` chose
MAX_COPIES_IN_FLIGHT = 16
MAX_LATENCY_US = 10_000_000

_GPU = re.compile(r"(0|[1-9][0-9]{0,2})=(.+)", re.ASCII)
MEMFD_ONLY = ("gpu_copy_bandwidth", "gpu_copy_latency_us")
_OF_GPUS = ("gpu_device", "gpu_chunk", "gpu_copies_in_flight", "gpu_direct", *MEMFD_ONLY)

#: Names a library that plays cuFile, for tests: the real one reads into no shared memory.
PLAYED_VARIABLE = "TIERD_PLAYED_CUFILE"


@dataclass(frozen=True, slots=True)
class GpuBudget:
    """What one GPU gives."""

    number: int  #: N of `gpu:N`
    nbytes: int

    def __str__(self) -> str:
        return f"{self.number}={self.nbytes}"

    @property
    def tier(self) -> str:
        return f"gpu:{self.number}"


def parse_gpus(value: object, base: Path) -> tuple[GpuBudget, ...]:
    """Raises ValueError."""
    entries = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, list):
        raise ValueError("expected a list of N=SIZE")
    gpus: dict[int, GpuBudget] = {}
    for entry in entries:
        match = _GPU.fullmatch(entry) if isinstance(entry, str) else None
        if match is None:
            raise ValueError("expected N=SIZE, like '0=20GiB'")
        number = int(match[1])
        if number in gpus:
            raise ValueError(f"GPU {number} is there twice")
        gpus[number] = GpuBudget(number, parse_size(match[2]))
    return tuple(gpus.values())


def parse_chunk(value: object, base: Path) -> int | None:
    """Raises ValueError."""
    if value == "auto":
        return None
    expected = "expected a power of 2 from 2MiB to 1GiB, or auto"
    if not isinstance(value, str | int):
        raise ValueError(expected)
    size = parse_size(value)
    if size & (size - 1) or not SMALLEST_CHUNK <= size <= LARGEST_CHUNK:
        raise ValueError(expected)
    return size


def chunk_bytes(chosen: int | None, budget_bytes: int) -> int:
    """The chunk of a GPU with this budget: what was chosen, else a 1024th of the budget, from 2
    to 64 MiB: so little is lost by rounding (a layer takes whole chunks), and a client has few
    descriptors to ask for."""
    if chosen is not None:
        return chosen
    share = max(budget_bytes // AUTO_CHUNKS, 1)
    return min(max(1 << (share.bit_length() - 1), SMALLEST_CHUNK), LARGEST_AUTO_CHUNK)


def played_library() -> str | None:
    """The library that is to be taken for cuFile instead of NVIDIA's: tests' alone."""
    return os.environ.get(PLAYED_VARIABLE) or None


def check(config: Config) -> None:
    """Raises ConfigError where settings contradict each other, or would do nothing."""
    given = [key for key in _OF_GPUS if config.sources[key] != "default"]
    if given and not config.gpus:
        raise ConfigError(
            f"{config.sources[given[0]]}: {given[0]} has no effect without a GPU: "
            "give --gpu N=SIZE (TOML: gpus) too"
        )
    if config.gpu_direct and config.gpu_device == "memfd" and played_library() is None:
        raise ConfigError(
            f"{config.sources['gpu_direct']}: gpu_direct: cuFile reads into the memory of GPUs, "
            "gpu_device is memfd, which is memory of the host"
        )
    for key in MEMFD_ONLY:
        if key in given and config.gpu_device != "memfd":
            raise ConfigError(
                f"{config.sources[key]}: {key} is for gpu_device memfd only; it is "
                f"{config.gpu_device}, which copies as fast as it can"
            )
    for gpu in config.gpus:
        chunk = chunk_bytes(config.gpu_chunk, gpu.nbytes)
        if gpu.nbytes < chunk:
            raise ConfigError(
                f"{config.sources['gpus']}: the budget of {gpu.tier} is {gpu.nbytes} bytes, at "
                f"least one chunk of {chunk} bytes ({format_size(chunk)}) is needed"
            )
