from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tierd_tools.errors import BadSetting, TextRefused
from tierd_tools.pack_settings import DEFAULT_GROUP, DEFAULT_WINDOWS, Settings

if TYPE_CHECKING:
    from pathlib import Path


def test_what_was_not_said_has_its_default(tmp_path: Path) -> None:
    assert Settings.check() == Settings()
    assert Settings.check(codec="int4").group == DEFAULT_GROUP
    text = tmp_path / "text"
    text.write_text("once")
    wanda = Settings.check(prune="wanda", sparsity=0.5, calibration=text)
    assert wanda.windows == DEFAULT_WINDOWS


def test_the_text_is_that_of_the_command_without_its_paths(tmp_path: Path) -> None:
    texts = []
    for name, content in (("one", "once"), ("two", "once"), ("three", "twice")):
        (tmp_path / name).write_text(content)
        settings = Settings.check(
            codec="int8",
            group=64,
            prune="wanda",
            sparsity=0.5,
            sparsity_of=["*.mlp=0.6"],
            keep=["*.0"],
            calibration=tmp_path / name,
            windows=4,
        )
        texts.append(settings.text())
    assert texts[0] == texts[1] != texts[2]
    assert str(tmp_path) not in texts[0]
    assert (
        "--prune wanda --sparsity 0.5 --sparsity-of '*.mlp=0.6' --keep '*.0' --codec int8 "
        "--group 64 --calibration xxh3_128:"
    ) in texts[0]
    assert texts[0].endswith("--calibration-windows 4")


@pytest.mark.parametrize("group", [-64, 0, 1, 63, 96])
def test_a_group_that_is_no_multiple_of_64_is_refused_by_its_value(group: int) -> None:
    with pytest.raises(BadSetting, match=rf"group {group} is not a positive multiple of 64"):
        Settings.check(codec="int8", group=group)


def test_a_group_that_no_index_can_hold_is_refused_before_anything_is_written() -> None:
    with pytest.raises(BadSetting, match=rf"group {1 << 63} is above {(1 << 63) - 1}"):
        Settings.check(codec="int8", group=1 << 63)


def test_a_calibration_that_cannot_be_read_or_says_nothing_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text(" \n")
    for calibration, text in ((tmp_path / "none", "none: No such file"), (empty, "holds no text")):
        with pytest.raises(TextRefused, match=text):
            Settings.check(prune="wanda", sparsity=0.5, calibration=calibration)
    empty.write_text("once")
    with pytest.raises(BadSetting, match="calibration-windows 0: at least 1"):
        Settings.check(prune="wanda", sparsity=0.5, calibration=empty, windows=0)


def test_pruning_without_any_share_is_refused() -> None:
    with pytest.raises(BadSetting, match="wanda needs a sparsity"):
        Settings.check(prune="wanda")
    Settings.check(prune="magnitude", sparsity_of=["*.up_proj=0.5"])
