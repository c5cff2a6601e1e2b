"""A folder with tierd and what the node lacks, beside the packages that the node has.

No virtual environment: one made from a virtual environment (as the Python of GPU images is) would
see the packages of the base interpreter, not those of that environment.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

#: What tierd and its tests import, and what builds it. Nothing is fetched.
NEEDED: Final = (
    *("msgpack", "numpy", "rich", "safetensors", "torch", "transformers", "uvloop", "xxhash"),
    *("pytest", "pytest-asyncio", "pytest-timeout", "hypothesis"),
    *("scikit-build-core", "nanobind", "pip"),
)


#: The least versions that pyproject.toml asks for. An older one is tried, unless WHEELS has one.
BUILT_WITH: Final = {"nanobind": 3, "scikit-build-core": 1}


@dataclass(frozen=True, slots=True)
class Environment:
    """wheels: those of WHEELS= that the node lacks, or has too old. missing: what is in neither."""

    site: Path
    wheels: tuple[Path, ...]
    missing: tuple[str, ...]
    variables: Mapping[str, str]

    def take_wheels(self) -> list[str]:
        """The command that puts `wheels` into `site`; they may be what builds the rest."""
        return [*self._pip, *map(str, self.wheels)]

    def install(self, build: Path) -> list[str]:
        """The command that builds the native modules and fills `site`, without a network."""
        return [*self._pip, "-C", f"build-dir={build}", "."]

    @property
    def _pip(self) -> list[str]:
        return [
            sys.executable, "-m", "pip", "install", "--no-index", "--no-deps",
            "--no-build-isolation", "--no-compile", "--disable-pip-version-check",
            "--no-warn-script-location", "--root-user-action=ignore", "--upgrade",
            "--target", str(self.site),
        ]  # fmt: skip

    @property
    def problem(self) -> str | None:
        if not self.missing:
            return None
        names = ", ".join(self.missing)
        return f"missing here and in WHEELS=: {names} (pip download --no-deps -d WHEELS NAME)"


def prepare(site: Path, wheels: Path | None) -> Environment:
    """Raises OSError when `wheels` cannot be listed."""
    by_name = {_name(path): path for path in sorted(wheels.glob("*.whl"))} if wheels else {}
    if wheels is not None and not by_name:
        raise FileNotFoundError(f"WHEELS={wheels} holds no wheel")
    absent = {name for name in (*NEEDED, *by_name) if _version(name) is None}
    old = {name for name, least in BUILT_WITH.items() if _major(name) < least}
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))),
        # cmake and ninja of the environment that this Python belongs to
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    }
    return Environment(
        site,
        tuple(path for name, path in by_name.items() if name in absent | old),
        tuple(sorted(name for name in absent if name in NEEDED and name not in by_name)),
        variables,
    )


def _name(wheel: Path) -> str:
    """As packages are compared: `pytest_asyncio-1.5.0-py3-none-any.whl` is pytest-asyncio."""
    return re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _major(name: str) -> int:
    return int((_version(name) or "0").split(".")[0])
