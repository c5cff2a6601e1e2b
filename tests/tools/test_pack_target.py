from __future__ import annotations

import errno
import math
import os
from typing import TYPE_CHECKING, Any

import pytest

from tierd_tools import pack_staging
from tierd_tools.errors import (
    BadSetting,
    CheckpointError,
    CheckpointMissing,
    DiskFull,
    PackError,
    TargetBusy,
    TargetRefused,
    TargetUnwritable,
)
from tierd_tools.pack import pack
from tierd_tools.pack_staging import Staging
from tierd_tools.verify import verify

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"sparsity": 0.5}, "without --prune"),
        ({"sparsity_of": ["*=0.5"]}, "without --prune"),
        ({"prune": "magnitude"}, "needs a sparsity"),
        ({"prune": "magnitude", "sparsity": 1.0}, r"1\.0 is outside"),
        ({"prune": "magnitude", "sparsity": -0.1}, r"-0\.1 is outside"),
        ({"prune": "magnitude", "sparsity": math.nan}, "nan is outside"),
        ({"prune": "magnitude", "sparsity": math.inf}, "inf is outside"),
        ({"prune": "random", "sparsity": 0.5}, "'random' is unknown: none, magnitude, wanda"),
        ({"prune": "wanda", "sparsity": 0.5}, "wanda needs a calibration text"),
        ({"codec": "int3"}, "'int3' is unknown: lossless, raw, int8, int4"),
        ({"codec": "int4", "group": 96}, "96 is not a positive multiple of 64"),
        ({"group": 128}, "128 has no effect with codec lossless"),
        ({"prune": "magnitude", "sparsity_of": ["a"]}, "'a' is not PATTERN=S"),
        ({"keep": [""]}, "'' is no pattern"),
        ({"calibration": "text"}, "text without --prune wanda"),
        ({"calibration_windows": 4}, "4 without --prune wanda"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_read(
    tmp_path: Path, wrong: dict[str, Any], text: str
) -> None:
    with pytest.raises(BadSetting, match=text):
        pack(tmp_path / "nowhere", tmp_path / "p", **wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".hidden", "with space", "a..b", "-x", "é"])
def test_a_pack_that_no_daemon_would_serve_is_refused_by_its_name(
    tmp_path: Path, checkpoints: Any, name: str
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    with pytest.raises(BadSetting, match="model name"):
        pack(source, tmp_path / name)


def test_a_missing_model_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match="does not exist"):
        pack(tmp_path / "nowhere", tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_pruning_a_model_without_numbered_layers_is_refused(
    tmp_path: Path, checkpoints: Any
) -> None:
    source = checkpoints.write(tmp_path / "m", {"lm_head.weight": ("F32", (1, 1), bytes(4))})
    with pytest.raises(PackError, match="nothing to prune"):
        pack(source, tmp_path / "p", prune="magnitude", sparsity=0.5)


def test_an_existing_pack_is_replaced_and_keeps_its_access_mode(
    tmp_path: Path, checkpoints: Any
) -> None:
    tensors = checkpoints.llama()
    source = checkpoints.write(tmp_path / "m", tensors)
    assert not pack(source, tmp_path / "p").replaced
    (tmp_path / "p" / "tierd.json").chmod(0o640)
    (tmp_path / "p").chmod(0o750)
    report = pack(source, tmp_path / "p", prune="magnitude", sparsity=0.5)
    assert report.replaced
    assert report.zero_share == pytest.approx(0.5, abs=0.01)
    verify(tmp_path / "p")
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o750
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "p").iterdir()} == {0o640}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "p"]


def test_a_target_that_is_no_pack_is_refused_and_untouched(
    tmp_path: Path, checkpoints: Any
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.tex").write_text("precious")
    with pytest.raises(TargetRefused, match="is not a pack"):
        pack(source, tmp_path / "p")
    with pytest.raises(TargetRefused, match="is not a pack"):
        pack(source, source)
    (tmp_path / "f").touch()
    with pytest.raises(TargetRefused, match="not a directory"):
        pack(source, tmp_path / "f")
    assert (tmp_path / "p" / "thesis.tex").read_text() == "precious"


def test_a_pack_with_somebodys_folder_in_it_is_not_replaced(
    tmp_path: Path, checkpoints: Any
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    pack(source, tmp_path / "p")
    (tmp_path / "p" / "notes").mkdir()
    with pytest.raises(TargetRefused, match="notes"):
        pack(source, tmp_path / "p")


def test_an_empty_directory_may_be_the_target(tmp_path: Path, checkpoints: Any) -> None:
    (tmp_path / "p").mkdir()
    pack(checkpoints.write(tmp_path / "m", checkpoints.llama()), tmp_path / "p")
    verify(tmp_path / "p")


def test_two_packers_on_one_target_are_refused(tmp_path: Path, checkpoints: Any) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    with (
        Staging.locked(tmp_path / "p", "tierd-packing"),
        pytest.raises(TargetBusy, match=f"pid {os.getpid()}"),
    ):
        pack(source, tmp_path / "p")
    pack(source, tmp_path / "p")


def test_a_read_only_target_is_refused_by_name(
    tmp_path: Path, checkpoints: Any, mounted_tmpfs: Any
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    with (
        mounted_tmpfs(tmp_path / "disk", "ro,size=1m") as disk,
        pytest.raises(TargetUnwritable, match=r"cannot write .*disk.*Read-only"),
    ):
        pack(source, disk / "p")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"keep": ["model.layers.7"]}, r"keep 'model\.layers\.7' matches none of the 21 tensors"),
        (
            {"prune": "magnitude", "sparsity_of": ["lm_head=0.5"]},
            "sparsity-of 'lm_head' matches none of the 15 linear weights",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(
    tmp_path: Path, checkpoints: Any, settings: Any, text: str
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    with pytest.raises(BadSetting, match=text):
        pack(source, tmp_path / "p", **settings)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_a_tensor_named_like_a_part_of_another_is_refused_before_anything_is_written(
    tmp_path: Path, checkpoints: Any
) -> None:
    tensors = checkpoints.llama(layers=1)
    tensors["model.layers.0.mlp.up_proj.weight.heads"] = ("U8", (4,), b"1234")
    source = checkpoints.write(tmp_path / "m", tensors)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\.heads' has the name that a pack"):
        pack(source, tmp_path / "p")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_a_full_disk_leaves_no_lock_behind(
    tmp_path: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskFull, match="file system full"):
        pack(source, tmp_path / "p")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_journal_that_cannot_be_begun_leaves_nothing_behind(
    tmp_path: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())

    def full(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pack_staging, "fsync_file", full)
    with pytest.raises(DiskFull, match="file system full"):
        pack(source, tmp_path / "p")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
