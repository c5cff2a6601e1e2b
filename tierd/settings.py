"""The settings that exist: how each is spelt on the command line, in TOML and in the environment,
and what makes a value of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierd.gpu_settings import (
    DEVICES,
    MAX_COPIES_IN_FLIGHT,
    MAX_LATENCY_US,
    parse_chunk,
    parse_gpus,
)
from tierd.sizes import parse_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_LOG_LEVELS = ("debug", "info", "warning", "error")
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_LARGEST_MODE = 0o777
LARGEST_WEIGHT = 10_000
_LARGEST_UID = 0xFFFF_FFFE  # one less than -1, which is nobody's
_SMALLEST_CHUNK, _LARGEST_CHUNK = 256 << 10, 64 << 20


@dataclass(frozen=True, slots=True)
class Setting:
    """One key. `parse` turns a text (flag, environment) or a TOML value into the value in effect,
    and raises ValueError saying what it expected. Its second argument is the directory that
    relative paths start from."""

    key: str
    default: Any
    parse: Callable[[object, Path], Any]
    toml: tuple[type, ...]  #: what the value may be in TOML, where texts need not stand for all
    metavar: str
    help: str
    repeatable: str | None = None  #: the flag of one entry, where the key is a list
    boolean: bool = False

    @property
    def flag(self) -> str:
        return self.repeatable or "--" + self.key.replace("_", "-")

    @property
    def variable(self) -> str:
        return "TIERD_" + self.key.upper()


def _paths(value: object, base: Path) -> tuple[Path, ...]:
    entries = value.split(":") if isinstance(value, str) else value
    if not isinstance(entries, list | tuple) or not all(
        isinstance(entry, str) and entry for entry in entries
    ):
        raise ValueError("expected a list of directories")
    return tuple((base / entry).absolute() for entry in entries)


def _size(value: object, base: Path) -> int:
    if not isinstance(value, str | int):
        raise ValueError("expected a size like '4GiB', or a number of bytes")
    return parse_size(value)


def _budget(value: object, base: Path) -> int | None:
    return None if value == "auto" else _size(value, base)


def _bandwidth(value: object, base: Path) -> int:
    if isinstance(value, str):
        value = value.removesuffix("/s")
    return _size(value, base)


def _chunk(value: object, base: Path) -> int | None:
    if value == "auto":
        return None
    size = _size(value, base)
    if size & (size - 1) or not _SMALLEST_CHUNK <= size <= _LARGEST_CHUNK:
        raise ValueError("expected a power of 2 from 256KiB to 64MiB, or auto")
    return size


def _socket(value: object, base: Path) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a path")
    return str(base / value)


def _mode(value: object, base: Path) -> int:
    if isinstance(value, str) and re.fullmatch(r"(0o?)?[0-7]{3}", value):
        value = int(value, 8)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _LARGEST_MODE:
        raise ValueError("expected an octal mode like '0660'")
    return value


def _number(lowest: int, highest: int) -> Callable[[object, Path], int]:
    def parse(value: object, base: Path) -> int:
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value, re.ASCII):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"expected a whole number from {lowest} to {highest}")
        if not lowest <= value <= highest:
            raise ValueError(f"expected a number from {lowest} to {highest}")
        return value

    return parse


def _weights(value: object, base: Path) -> dict[str, int]:
    expected = f"expected uid=weight, or default=weight, weights from 1 to {LARGEST_WEIGHT}"
    if isinstance(value, str):
        value = value.split(",")
    if isinstance(value, list):
        parts = [str(entry).partition("=") for entry in value]
        value = {name: weight for name, _, weight in parts}
        if len(value) < len(parts):
            raise ValueError(f"{expected}, each once")
    if not isinstance(value, dict):
        raise ValueError(expected)
    weights: dict[str, int] = {}
    for name, weight in value.items():
        uid = re.fullmatch(r"0|[1-9][0-9]{0,9}", name, re.ASCII)
        if name != "default" and not (uid and int(name) <= _LARGEST_UID):
            raise ValueError(expected)
        try:
            weights[name] = _number(1, LARGEST_WEIGHT)(weight, base)
        except ValueError as error:
            raise ValueError(expected) from error
    return weights


def _choice(*choices: str) -> Callable[[object, Path], str]:
    def parse(value: object, base: Path) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return value

    return parse


def _boolean(value: object, base: Path) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    raise ValueError("expected true or false")


_TEXT, _INT, _LIST, _BOOL, _TABLE = (str,), (int,), (list,), (bool,), (dict,)
_TEXT_OR_INT = (str, int)

SETTINGS = (
    Setting("models", (), _paths, _LIST, "DIR", "serve every pack in DIR; repeatable", "--models"),
    Setting("packs", (), _paths, _LIST, "DIR", "serve the pack DIR; repeatable", "--pack"),
    Setting(
        "dram", None, _budget, _TEXT_OR_INT, "SIZE",
        "the DRAM budget: 4GiB, 1.5GB, bytes, or auto = half of what is free (default)",
    ),
    Setting(
        "gpus", (), parse_gpus, _LIST, "N=SIZE",
        "keep at most SIZE of GPU N's memory; repeatable (default: no GPU)", "--gpu",
    ),
    Setting(
        "gpu_device", DEVICES[0], _choice(*DEVICES), _TEXT, "|".join(DEVICES),
        "how GPU memory is taken and shared; memfd: ordinary memory in place of a GPU's, for "
        "tests (default cuda_vmm)",
    ),
    Setting(
        "gpu_chunk", None, parse_chunk, _TEXT_OR_INT, "SIZE",
        "unit of GPU memory taken and given back: a power of 2 from 2MiB to 1GiB, or auto = a "
        "1024th of the budget, 2MiB to 64MiB (default)",
    ),
    Setting(
        "gpu_copies_in_flight", 2, _number(1, MAX_COPIES_IN_FLIGHT), _INT, "N",
        "layers copied to a GPU at the same time (default 2)",
    ),
    Setting(
        "gpu_copy_bandwidth", None, _bandwidth, _TEXT_OR_INT, "SIZE",
        "memfd only: copy at most SIZE bytes per second (default: no limit)",
    ),
    Setting(
        "gpu_copy_latency_us", 0, _number(0, MAX_LATENCY_US), _INT, "US",
        "memfd only: a copy begins so long after it was asked for (default 0)",
    ),
    Setting(
        "gpu_direct", False, _boolean, _BOOL, "BOOL",
        "what DRAM does not have is read into GPUs past it, by cuFile, or not at all (default no)",
        boolean=True,
    ),
    Setting("socket", None, _socket, _TEXT, "PATH", "listen here"),
    Setting(
        "socket_mode", 0o660, _mode, _TEXT_OR_INT, "MODE",
        "permissions of the socket, octal (default 0660)",
    ),
    Setting(
        "ssd_bandwidth", None, _bandwidth, _TEXT_OR_INT, "SIZE",
        "read at most SIZE bytes per second, all packs together (default: no limit)",
    ),
    Setting(
        "readers", 4, _number(1, 64), _INT, "N",
        "threads that read a device (default 4, until it was measured)",
    ),
    Setting(
        "reads_in_flight", 2, _number(1, 64), _INT, "N",
        "layers read at the same time from a device (default 2, until it was measured)",
    ),
    Setting(
        "read_chunk", None, _chunk, _TEXT_OR_INT, "SIZE",
        "what one read asks for: a power of 2 from 256KiB to 64MiB, or auto = measured (default)",
    ),
    Setting(
        "convoy_wait", 10_000, _number(0, 3_600_000), _INT, "MS",
        "hold back reads for a process at most so long, where that lets processes of one model "
        "share their reads; 0: never (default 10000)",
    ),
    Setting(
        "max_clients", 64, _number(1, 4096), _INT, "N",
        "connections served at the same time (default 64)",
    ),
    Setting(
        "weights", {}, _weights, _TABLE, "UID=N",
        "share of a device for clients of a uid, or of those that are not named (default=N), "
        "against 100; repeatable", "--weight",
    ),
    Setting(
        "populate", True, _boolean, _BOOL, "BOOL",
        "take the whole budget from the system at start, in the background", boolean=True,
    ),
    Setting(
        "mlock", "auto", _choice("auto", "off"), _TEXT, "auto|off",
        "lock the budget in memory where that is permitted (default auto)",
    ),
    Setting(
        "log_level", "info", _choice(*_LOG_LEVELS), _TEXT, "|".join(_LOG_LEVELS),
        "least important messages to log (default info)",
    ),
)  # fmt: skip

BY_KEY = {setting.key: setting for setting in SETTINGS}
