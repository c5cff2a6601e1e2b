"""How a checkpoint is to be packed: codec, pruning, and what is left alone, checked before a read.

A refused setting is a BadSetting that names the value and what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from tierd import __version__
from tierd_layouts.codecs import LEVEL_LIMITS
from tierd_layouts.json_members import MAX_INTEGER
from tierd_layouts.tile_grid import TILE
from tierd_tools.errors import BadSetting, TextRefused
from tierd_tools.sparsity import Sparsities

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

TOOL = f"tierctl pack {__version__}"
CODECS = ("lossless", "raw", "int8", "int4")
PRUNINGS = ("none", "magnitude", "wanda")
DEFAULT_GROUP = 128
#: of a few hundred tokens each, as many as the paper's 128 of 2048 would take a CPU hours
DEFAULT_WINDOWS = 32


@dataclass(frozen=True, slots=True)
class Settings:
    """What a pack run was asked for; nothing here depends on the checkpoint.

    group: columns that share a scale, 0 for codecs without scales. calibration: the text for
    Wanda, None for the others; text_digest: xxh3_128 of its bytes.
    """

    codec: str = "lossless"
    group: int = 0
    prune: str = "none"
    sparsities: Sparsities = field(default_factory=Sparsities)
    calibration: Path | None = None
    windows: int = 0
    text_digest: str = ""

    @classmethod
    def check(
        cls,
        *,
        codec: str = "lossless",
        group: int | None = None,
        prune: str = "none",
        sparsity: float | None = None,
        sparsity_of: Sequence[str] = (),
        keep: Sequence[str] = (),
        calibration: str | os.PathLike[str] | None = None,
        windows: int | None = None,
    ) -> Settings:
        """From what a user said; None: not said. Reads the calibration text. Raises BadSetting."""
        if codec not in CODECS:
            raise BadSetting(f"codec {codec!r} is unknown: {', '.join(CODECS)}")
        if prune not in PRUNINGS:
            raise BadSetting(f"prune {prune!r} is unknown: {', '.join(PRUNINGS)}")
        _check_pruning(prune, sparsity, sparsity_of)
        text = _calibration_text(prune, calibration, windows)
        return cls(
            codec=codec,
            group=_group(codec, group),
            prune=prune,
            sparsities=Sparsities.parse(sparsity, sparsity_of, keep),
            calibration=None if calibration is None else Path(calibration),
            windows=0 if calibration is None else windows or DEFAULT_WINDOWS,
            text_digest=xxhash.xxh3_128_hexdigest(text) if text else "",
        )

    @property
    def lossy_codec(self) -> bool:
        """Whether the codec does not give back every bit."""
        return self.codec in LEVEL_LIMITS

    def text(self) -> str:
        """The command without its paths: equal texts make equal packs of one checkpoint."""
        parts = [TOOL, f"--prune {self.prune}", self.sparsities.text(), f"--codec {self.codec}"]
        if self.group:
            parts.append(f"--group {self.group}")
        if self.calibration is not None:
            parts.append(f"--calibration xxh3_128:{self.text_digest}")
            parts.append(f"--calibration-windows {self.windows}")
        return " ".join(part for part in parts if part)


def _check_pruning(prune: str, sparsity: float | None, sparsity_of: Sequence[str]) -> None:
    if prune == "none" and sparsity is not None:
        raise BadSetting(f"sparsity {sparsity} without --prune magnitude or wanda has no effect")
    if prune == "none" and sparsity_of:
        raise BadSetting(
            f"sparsity-of {sparsity_of[0]!r} without --prune magnitude or wanda has no effect"
        )
    if prune != "none" and sparsity is None and not sparsity_of:
        raise BadSetting(f"prune {prune} needs a sparsity in [0, 1), or sparsity-of PATTERN=S")


def _calibration_text(
    prune: str, calibration: str | os.PathLike[str] | None, windows: int | None
) -> bytes:
    if prune != "wanda":
        if calibration is not None:
            raise BadSetting(f"calibration {calibration} without --prune wanda has no effect")
        if windows is not None:
            raise BadSetting(f"calibration-windows {windows} without --prune wanda has no effect")
        return b""
    if calibration is None:
        raise BadSetting("prune wanda needs a calibration text: --calibration FILE")
    if windows is not None and windows < 1:
        raise BadSetting(f"calibration-windows {windows}: at least 1 is needed")
    try:
        text = Path(calibration).read_bytes()
    except OSError as error:
        raise TextRefused(f"calibration {calibration}: {error.strerror}") from error
    if not text.strip():
        raise TextRefused(f"calibration {calibration} holds no text")
    return text


def _group(codec: str, group: int | None) -> int:
    if codec not in LEVEL_LIMITS:
        if group is not None:
            raise BadSetting(f"group {group} has no effect with codec {codec}: only int8, int4")
        return 0
    group = DEFAULT_GROUP if group is None else group
    if group < TILE or group % TILE:
        raise BadSetting(f"group {group} is not a positive multiple of {TILE}")
    if group > MAX_INTEGER:
        raise BadSetting(f"group {group} is above {MAX_INTEGER}, the most that an index can hold")
    return group
