"""The progress bars of transformers, left out where they would count placeholders."""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_one = threading.Lock()


def _anew() -> None:
    """In a forked child, whose parent may have been loading in another thread."""
    global _one
    _one = threading.Lock()


os.register_at_fork(after_in_child=_anew)


@contextmanager
def left_out() -> Iterator[None]:
    """Inside, this thread's transformers draws none; other threads, and later calls, do as before.

    Bars stay for who asked for them: by a hook of their own (`transformers.utils.logging.
    set_tqdm_hook`), or with HF_HUB_DISABLE_PROGRESS_BARS=0. Thread-safe; one thread at a time.
    """
    from huggingface_hub import constants
    from transformers.utils import logging

    here = threading.get_ident()

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        made: Callable[..., Any] = factory
        if threading.get_ident() == here:
            made = logging.EmptyTqdm
        return made(*args, **options)

    with _one:
        theirs = logging.set_tqdm_hook(hook)
        if theirs is not None or constants.HF_HUB_DISABLE_PROGRESS_BARS is False:
            logging.set_tqdm_hook(theirs)
        try:
            yield
        finally:
            ours = logging.set_tqdm_hook(theirs)
            if ours is not hook:  # set meanwhile, by another thread
                logging.set_tqdm_hook(ours)
