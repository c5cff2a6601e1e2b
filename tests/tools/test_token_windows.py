"""What is refused is tested with its users, in test_calibrate.py and test_evaluate.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tierd_tools.errors import BadSetting, TextRefused
from tierd_tools.token_windows import consecutive, read_tokens, spread

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = torch.arange(20)


def test_consecutive_windows_are_the_start_of_the_text_cut_up() -> None:
    assert consecutive(TOKENS, 3, 4, where="the text").tolist() == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


def test_spread_windows_reach_from_the_first_token_to_the_last() -> None:
    assert spread(TOKENS, 3, 4, where="the text").tolist() == [
        [0, 1, 2, 3],
        [8, 9, 10, 11],
        [16, 17, 18, 19],
    ]
    assert spread(TOKENS, 1, 4, where="the text").tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("windows", "window_tokens"), [(10, 2), (3, 6), (7, 2), (4, 5), (2, 9)])
def test_spread_windows_do_not_overlap(windows: int, window_tokens: int) -> None:
    found = spread(TOKENS, windows, window_tokens, where="the text")
    assert found.shape == (windows, window_tokens)
    assert len(set(found.flatten().tolist())) == windows * window_tokens


@pytest.mark.parametrize("cut", [consecutive, spread])
def test_a_text_must_have_the_tokens_of_all_windows(cut: Any) -> None:
    assert cut(TOKENS, 5, 4, where="the text").shape == (5, 4)
    with pytest.raises(TextRefused, match="20 tokens, 7 windows of 3 take 21"):
        cut(TOKENS, 7, 3, where="the text")
    with pytest.raises(BadSetting, match="-1 windows of 4"):
        cut(TOKENS, -1, 4, where="the text")


def test_a_text_is_tokenised_whole_by_the_folders_own_tokenizer(
    tiny_models: Any, tmp_path: Path
) -> None:
    tiny_models.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "text").write_text("a\nä", encoding="utf-8")
    tokens = read_tokens(tmp_path, tmp_path / "text")
    assert tokens.dtype == torch.int64
    assert len(tokens) == 4, "one a byte"
