"""A Hugging Face checkpoint to a pack: pruned on the way if asked for, resumable, verified.

The pack appears under its name when all of it was read back and found right; a pack that was there
is exchanged with it. `pack_run` says how it comes about.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tierd_layouts.errors import FormatError, NameRefused
from tierd_layouts.index import INDEX_FILE
from tierd_layouts.names import check_model_name
from tierd_tools.checkpoint import Checkpoint
from tierd_tools.errors import BadSetting, PackError, ToolError
from tierd_tools.pack_plan import plan
from tierd_tools.pack_report import PackReport
from tierd_tools.pack_run import PackRun
from tierd_tools.pack_settings import Settings
from tierd_tools.pack_staging import Staging, refuse_unless_replaceable
from tierd_tools.progress import SilentProgress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tierd_tools.progress import Progress

SUFFIX = "tierd-packing"


def pack(
    model_dir: str | os.PathLike[str],
    pack_dir: str | os.PathLike[str],
    *,
    codec: str = "lossless",
    group: int | None = None,
    prune: str = "none",
    sparsity: float | None = None,
    sparsity_of: Sequence[str] = (),
    keep: Sequence[str] = (),
    calibration: str | os.PathLike[str] | None = None,
    calibration_windows: int | None = None,
    progress: Progress | None = None,
) -> PackReport:
    """Writes the pack of a checkpoint and says what was done.

    codec: `lossless` (of each tensor the smallest form), `raw`, `int8` or `int4`; group: columns
    that share a scale. prune: `none`, `magnitude` or `wanda`, the latter with a calibration text
    and how many windows of it to run. sparsity_of: texts `PATTERN=S`. keep: patterns of tensors
    that are neither pruned nor quantised. Patterns are those of `sparsity`.
    Raises BadSetting, CheckpointError, NameRefused, TextRefused, or another PackError. Whatever is
    raised, a pack that was at `pack_dir` is still there and whole.
    """
    started = time.monotonic()
    progress = progress or SilentProgress()
    settings = Settings.check(
        codec=codec,
        group=group,
        prune=prune,
        sparsity=sparsity,
        sparsity_of=sparsity_of,
        keep=keep,
        calibration=calibration,
        windows=calibration_windows,
    )
    target = _target(Path(pack_dir))
    checkpoint = Checkpoint.open(model_dir)
    refuse_unless_replaceable(target, INDEX_FILE)
    the_plan = plan(checkpoint, settings)
    if settings.prune != "none" and not the_plan.prunable:
        raise PackError(f"{model_dir}: nothing to prune: no numbered layer has a 2-D .weight")
    with Staging.locked(target, SUFFIX) as staging:
        run = PackRun(checkpoint, the_plan, settings, staging, progress)
        try:
            index = run.write()
            replaced = run.publish(index)
        except ToolError as error:
            raise type(error)(f"{error}; {run.what_is_kept()}") from error
        except FormatError as error:
            raise PackError(f"{error}; {run.what_is_kept()}") from error
    return PackReport.of(
        index,
        run.finished,
        pack_dir=str(target),
        imported=checkpoint.imported,
        layers_reused=run.reused,
        replaced=replaced,
        seconds=time.monotonic() - started,
    )


def _target(pack_dir: Path) -> Path:
    target = Path(os.path.realpath(pack_dir))
    try:
        check_model_name(target.name)
    except NameRefused as error:
        raise BadSetting(f"{pack_dir}: {error}") from error
    return target
