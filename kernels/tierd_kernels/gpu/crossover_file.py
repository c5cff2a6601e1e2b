"""The file that keeps what was measured on one card: $XDG_CACHE_HOME/tierd/crossover-*.json.

Its name says card, driver and a digest of all that the times depend on beside them: with other
kernels, another Triton or torch, another file is used. A file that cannot be understood is named in
the log and measured anew. A file beside it, *.lock, is locked by who adds to it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Final

import torch
import triton

from tierd_kernels.gpu.plans import CUDA, TOKEN_BLOCKS, VARIANTS, Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

Table = dict[int, dict[Plan | None, float]]
"""Seconds by number of tokens and plan; None is expanding and a dense product."""

FORMAT: Final = "tierd-crossovers-1"
LOCK_WAIT_S: Final = 10.0
"""Adding takes milliseconds: who has the lock for longer is stopped, and is not waited for."""
_RETRY_S: Final = 0.01
_DRIVER_VERSION: Final = Path("/sys/module/nvidia/version")

_WRONG: Final = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)
"""What reading a file that we did not write can raise."""

_log = logging.getLogger(__name__)


class CrossoverFile:
    """Tables of one card by the matrix that they were measured with. Not thread-safe.

    path: None where nothing can be kept.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def read(self) -> dict[str, Table]:
        """What the file has; nothing if there is none or it is wrong, which the log then says."""
        if self.path is None:
            return {}
        try:
            return _parsed(json.loads(self.path.read_bytes()))
        except FileNotFoundError:
            return {}
        except _WRONG as error:
            _log.warning("%s is not used, measuring again: %r", self.path, error)
            return {}

    def add(self, key: str, table: Table) -> None:
        """Put a table into the file, which other processes may have added to meanwhile."""
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.path):
                _replace(self.path, _text(self.read() | {key: table}))
        except OSError as error:
            _log.warning("%s is not written, every process measures: %s", self.path, error)


def default_path(device: torch.device) -> Path | None:
    """The file of a GPU, in the user's cache folder; None, and a warning, for who has none."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    try:
        root = Path(folder) if os.path.isabs(folder) else Path.home() / ".cache"
    except RuntimeError as error:
        _log.warning("nowhere to keep what is measured on %s: %s", device, error)
        return None
    card = torch.cuda.get_device_name(device)
    name = "-".join([card, _driver_version(), _digest()])
    return root / "tierd" / f"crossover-{re.sub('[^A-Za-z0-9.]+', '-', name)}.json"


def _driver_version() -> str:
    try:
        return _DRIVER_VERSION.read_text().strip()
    except OSError:  # not every sandbox shows the kernel's modules
        return f"cuda{torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]


def _digest() -> str:
    """Of the kernels, and of the versions of what compiles them and what they are compared to."""
    digest = hashlib.sha256(f"{FORMAT} {triton.__version__} {torch.__version__}".encode())
    folder = Path(__file__).parent
    for source in sorted([*folder.glob("*.py"), *folder.glob("*.cu")]):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _text(tables: dict[str, Table]) -> str:
    plain = {
        key: {
            str(tokens): [[_plain(plan), seconds] for plan, seconds in times.items()]
            for tokens, times in table.items()
        }
        for key, table in tables.items()
    }
    return json.dumps({"format": FORMAT, "tables": plain}, indent=1)


def _plain(plan: Plan | None) -> list[Any] | None:
    if plan is None:
        return None
    return [plan.tokens, plan.splits, plan.warps, plan.stages, plan.variant]


def _parsed(content: Any) -> dict[str, Table]:
    """Raises one of _WRONG for what this module did not write."""
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r} is not {FORMAT!r}")
    return {
        str(key): {
            int(tokens): {_plan(plan): _seconds(seconds) for plan, seconds in times}
            for tokens, times in table.items()
        }
        for key, table in content["tables"].items()
    }


def _plan(fields: Any) -> Plan | None:
    if fields is None:
        return None
    tokens, splits, warps, stages, variant = fields
    if (
        tokens not in TOKEN_BLOCKS
        or type(splits) is not int
        or splits < 1
        or (warps, stages, variant) not in (*VARIANTS, CUDA)
    ):
        raise ValueError(f"plan {fields} is none that there is")
    return Plan(tokens, splits, warps, stages, variant)


def _seconds(number: Any) -> float:
    if type(number) is not float or not (0 < number < math.inf):
        raise ValueError(f"a time of {number!r} seconds")
    return number


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Inside, no other process is inside for this file; one that dies inside is so no longer.

    Where files cannot be locked, or another keeps the lock, it goes on without, which the log says:
    of two processes that add at once one may then be forgotten, and measures again. Raises OSError.
    """
    with path.with_suffix(".lock").open("ab") as file, ExitStack() as stack:
        try:
            _lock(file.fileno())
            # Closing does not free it while a forked child has the file.
            stack.callback(fcntl.flock, file.fileno(), fcntl.LOCK_UN)
        except OSError as error:
            _log.warning("%s is written without a lock: %s", path, error)
        yield


def _lock(descriptor: int) -> None:
    """Raises OSError, BlockingIOError when the wait was in vain."""
    deadline = monotonic() + LOCK_WAIT_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if monotonic() > deadline:
                raise
            sleep(_RETRY_S)


def _replace(path: Path, text: str) -> None:
    """Write a file so that nobody ever sees half of it. Raises OSError."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
