"""The configuration in effect: flags, above the environment, above a TOML file, above defaults.

Every value knows where it came from, and nothing that was given is ignored: an unknown key, a wrong
type or a size that makes no sense is a ConfigError that names the place, the key and the value.
"""

from __future__ import annotations

import argparse
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tierd import __version__, gpu_settings
from tierd.core.model import DEFAULT_WEIGHT
from tierd.errors import ConfigError
from tierd.settings import BY_KEY, SETTINGS, Setting
from tierd_layouts.errors import LayoutsError
from tierd_layouts.records import INDEX_FILE
from tierd_layouts.wire import SOCKET_VARIABLE, resolve_socket

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tierd.gpu.device import Kind
    from tierd.gpu_settings import GpuBudget

CONFIG_VARIABLE = "TIERD_CONFIG"

_TOML_NAMES = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "a table",
}


@dataclass(frozen=True, slots=True)
class Config:
    """What `load` found. Sizes in bytes."""

    models: tuple[Path, ...]  #: directories of packs
    packs: tuple[Path, ...]  #: single packs
    dram_bytes: int | None  #: None: auto
    gpus: tuple[GpuBudget, ...]
    gpu_device: Kind
    gpu_chunk: int | None  #: None: auto
    gpu_copies_in_flight: int
    gpu_copy_bandwidth: int | None  #: bytes per second; None: unlimited
    gpu_copy_latency_us: int
    gpu_direct: bool
    socket: str
    socket_mode: int
    ssd_bandwidth: int | None  #: bytes per second; None: unlimited
    readers: int
    reads_in_flight: int
    convoy_wait: int  #: milliseconds
    read_chunk: int | None  #: bytes that one read asks for; None: as measured
    max_clients: int
    weights: Mapping[str, int]  #: by uid, and "default"
    populate: bool
    mlock: str  #: "auto" or "off"
    log_level: str
    check_config: bool = False  #: only check and print, do not serve
    sources: Mapping[str, str] = field(default_factory=dict)  #: key -> where its value came from

    def effective(self) -> list[dict[str, Any]]:
        """{key, value, source} of every setting, in plain types, for people and JSON."""
        return [
            {
                "key": setting.key,
                "value": _plain(setting.key, self._value(setting.key)),
                "source": self.sources[setting.key],
            }
            for setting in SETTINGS
        ]

    def weight_of(self, uid: int) -> int:
        """The share of a device that a client of this uid has, against those of others."""
        return self.weights.get(str(uid), self.weights.get("default", DEFAULT_WEIGHT))

    def check_paths(self) -> None:
        """Raise ConfigError unless every directory of packs, and every pack, is one."""
        for key in ("models", "packs"):
            for path in self._value(key):
                if not path.is_dir():
                    raise ConfigError(f"{key}: {str(path)!r} is not a directory{self._from(key)}")
        for path in self.models:
            if (path / INDEX_FILE).is_file():
                raise ConfigError(
                    f"models: {str(path)!r} is itself a pack: give it with --pack, or the "
                    f"directory above it{self._from('models')}"
                )
        for path in self.packs:
            if not (path / INDEX_FILE).is_file():
                raise ConfigError(
                    f"packs: {str(path)!r} is not a pack: it has no {INDEX_FILE}"
                    f"{self._from('packs')}"
                )

    def _value(self, key: str) -> Any:
        return getattr(self, "dram_bytes" if key == "dram" else key)

    def _from(self, key: str) -> str:
        return f" ({self.sources[key]})"


def load(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """The configuration that these arguments (without the program's name) and variables mean.

    Raises ConfigError. `--help` and `--version` print and raise SystemExit(0).
    """
    flags = vars(_parser().parse_args(argv))
    file = flags.pop("config") or environ.get(CONFIG_VARIABLE)
    toml, where = _read_toml(Path(file)) if file else ({}, Path())
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for setting in SETTINGS:
        values[setting.key], sources[setting.key] = setting.default, "default"
        # All are parsed, so that an overruled mistake does not wait for the day it is needed.
        for given, base, source in _given(setting, flags, environ, toml, where):
            values[setting.key] = _parse(setting, given, base, source)
            sources[setting.key] = source
    if not values["models"] and not values["packs"]:
        raise ConfigError("nothing to serve: give --models DIR or --pack DIR (TOML: models, packs)")
    values["socket"] = _socket(values["socket"], sources["socket"], environ)
    values["dram_bytes"] = values.pop("dram")
    config = Config(**values, check_config=flags["check_config"], sources=sources)
    gpu_settings.check(config)
    return config


def _given(
    setting: Setting,
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    toml: Mapping[str, Any],
    where: Path,
) -> Iterator[tuple[Any, Path, str]]:
    """(raw value, base of relative paths, source), weakest first. An empty variable is not set."""
    if setting.key in toml:
        yield toml[setting.key], where.parent, f"file {where}"
    if environ.get(setting.variable):
        yield environ[setting.variable], Path(), f"environment {setting.variable}"
    if flags[setting.key] is not None:
        yield flags[setting.key], Path(), f"flag {setting.flag}"


def _parse(setting: Setting, given: Any, base: Path, source: str) -> Any:
    try:
        return setting.parse(given, base)
    except ValueError as error:
        raise ConfigError(f"{source}: {setting.key} = {given!r}: {error}") from error


def _socket(chosen: str | None, source: str, environ: Mapping[str, str]) -> str:
    # What was chosen above TOML is in `chosen` already; resolve_socket must not look again.
    others = {name: value for name, value in environ.items() if name != SOCKET_VARIABLE}
    try:
        return resolve_socket(chosen, for_listening=True, environ=others)
    except LayoutsError as error:
        raise ConfigError(f"{source}: socket: {error}") from error


def _read_toml(path: Path) -> tuple[dict[str, Any], Path]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for key, value in table.items():
        if key not in BY_KEY:
            raise ConfigError(f"{path}: unknown key {key!r}; known are {', '.join(BY_KEY)}")
        if type(value) not in BY_KEY[key].toml:
            kinds = " or ".join(_TOML_NAMES[kind] for kind in BY_KEY[key].toml)
            raise ConfigError(f"{path}: {key} = {value!r}: expected {kinds}")
    return table, path


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see tierd --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="tierd",
        description="Serves the layers of packed models to the processes of this machine.",
        epilog="Each option is also a key of the TOML file and a variable, e.g. dram, TIERD_DRAM.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"tierd {__version__}")
    parser.add_argument("--config", metavar="FILE", help=f"TOML file (else ${CONFIG_VARIABLE})")
    parser.add_argument(
        "--check-config", action="store_true", help="check, print the effective values and exit"
    )
    for setting in SETTINGS:
        options: dict[str, Any] = {"dest": setting.key, "help": setting.help}
        if setting.boolean:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = setting.metavar
            options["action"] = "append" if setting.repeatable else "store"
        parser.add_argument(setting.flag, **options)
    return parser


def _plain(key: str, value: Any) -> Any:
    if key in ("dram", "read_chunk", "gpu_chunk") and value is None:
        return "auto"
    if key == "socket_mode":
        return f"{value:04o}"
    if isinstance(value, tuple):
        return [str(entry) for entry in value]
    return value
