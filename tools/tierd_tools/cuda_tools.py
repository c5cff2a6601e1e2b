"""Where the programs of a CUDA toolkit are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

_HOMES: Final = ("CUDA_HOME", "CUDA_PATH")
_BELOW: Final = ("bin/{}", "{}", "{0}/{0}")
_TOOLKITS: Final = ("usr/local/cuda*/bin/{}", "usr/local/cuda*/{0}/{0}", "opt/nvidia/*/*/{}")
LOOKED_IN: Final = "on PATH, in CUDA_HOME, /usr/local/cuda* or /opt/nvidia"


def find(name: str, environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Path | None:
    """On PATH, else in CUDA_HOME or CUDA_PATH, else the newest where toolkits are installed below
    `root`."""
    if found := shutil.which(name, path=environ.get("PATH", "")):
        return Path(found)
    paths = [
        Path(environ[home], below.format(name))
        for home in _HOMES
        if environ.get(home)
        for below in _BELOW
    ]
    for pattern in _TOOLKITS:
        paths += sorted(root.glob(pattern.format(name)), reverse=True)
    return next((path for path in paths if path.is_file() and os.access(path, os.X_OK)), None)
