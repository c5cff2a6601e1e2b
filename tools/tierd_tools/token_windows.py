"""Windows of token ids of a text file, by the tokenizer that lies in a model's folder.

The text is tokenised whole, so a window begins where the one before it ends, often in the middle of
a line, and has no beginning-of-text token unless the tokenizer puts one at the start of the text.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tierd_tools.errors import BadSetting, TextRefused

if TYPE_CHECKING:
    import os

_TOKENIZERS = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "*.vocab")


def consecutive(
    tokens: torch.Tensor, windows: int, window_tokens: int, *, where: str
) -> torch.Tensor:
    """The first windows, end to end: int64[windows, window_tokens]. Raises TextRefused.

    where: the text's name, for the error.
    """
    _check(tokens, windows, window_tokens, where)
    return tokens[: windows * window_tokens].reshape(windows, window_tokens)


def spread(tokens: torch.Tensor, windows: int, window_tokens: int, *, where: str) -> torch.Tensor:
    """Windows at equal distances from the start of the text to its end, without overlap."""
    _check(tokens, windows, window_tokens, where)
    room = len(tokens) - windows * window_tokens
    starts = [
        i * window_tokens + (i * room // (windows - 1) if windows > 1 else 0)
        for i in range(windows)
    ]
    return torch.stack([tokens[start : start + window_tokens] for start in starts])


def read_tokens(
    model_dir: str | os.PathLike[str], text_path: str | os.PathLike[str]
) -> torch.Tensor:
    """The token ids of the UTF-8 text in `text_path`, int64[tokens]. Raises TextRefused."""
    from transformers import AutoTokenizer

    folder = Path(model_dir)
    try:
        text = Path(text_path).read_text(encoding="utf-8")
    except OSError as error:
        raise TextRefused(f"{text_path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TextRefused(f"{text_path} is not UTF-8 text: {error}") from error
    names = [entry.name for entry in folder.iterdir()]
    if not any(fnmatchcase(name, pattern) for name in names for pattern in _TOKENIZERS):
        raise TextRefused(f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}) to read text with")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        raise TextRefused(f"{folder}: the tokenizer cannot be loaded: {error!r}") from error
    # verbose: silent about texts that are longer than what the model takes at once
    ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _check(tokens: torch.Tensor, windows: int, window_tokens: int, where: str) -> None:
    if windows < 1 or window_tokens < 2:
        raise BadSetting(
            f"{windows} windows of {window_tokens} tokens: expected 1 window of 2 tokens or more"
        )
    if len(tokens) < windows * window_tokens:
        raise TextRefused(
            f"{where} has {len(tokens):,} tokens, {windows} windows of {window_tokens} take "
            f"{windows * window_tokens:,}"
        )
