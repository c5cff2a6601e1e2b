"""Bars of transformers: none where nothing is loaded, and as the user wants them elsewhere."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import pytest
from huggingface_hub import constants
from transformers.utils import logging

from tierd_client.progress_bars import left_out

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def as_by_default(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging, "_tqdm_active", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    theirs = logging.set_tqdm_hook(None)
    yield
    logging.set_tqdm_hook(theirs)


def bar(what: str) -> None:
    assert list(logging.tqdm(range(3), desc=what)) == [0, 1, 2]


def test_bars_are_left_out_inside_and_drawn_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    with left_out():
        bar("inside")
    assert capsys.readouterr().err == ""
    bar("after")
    assert "after" in capsys.readouterr().err
    assert logging.set_tqdm_hook(None) is None


def test_bars_of_another_thread_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    with left_out():
        other = threading.Thread(target=bar, args=("other",))
        other.start()
        other.join()
    assert "other" in capsys.readouterr().err


def test_a_hook_of_the_user_is_called_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def theirs(factory: Any, args: Any, options: Any) -> Any:
        asked.append(options["desc"])
        return factory(*args, **options)

    logging.set_tqdm_hook(theirs)
    with left_out():
        bar("inside")
    assert asked == ["inside"]
    assert "inside" in capsys.readouterr().err
    assert logging.set_tqdm_hook(None) is theirs


def test_who_asks_for_bars_in_the_environment_gets_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", False)
    with left_out():
        bar("inside")
    assert "inside" in capsys.readouterr().err


def test_a_hook_that_is_set_meanwhile_stays() -> None:
    def later(factory: Any, args: Any, options: Any) -> Any:
        return factory(*args, **options)

    with left_out():
        logging.set_tqdm_hook(later)
    assert logging.set_tqdm_hook(None) is later


def test_a_child_that_is_forked_while_another_thread_loads_does_not_wait_for_it() -> None:
    inside, forked = threading.Event(), threading.Event()

    def load() -> None:
        with left_out():
            inside.set()
            forked.wait(60)

    thread = threading.Thread(target=load)
    thread.start()
    inside.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        with left_out():
            os._exit(7)
    forked.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_threads_that_load_at_once_leave_nothing_behind() -> None:
    def load() -> None:
        for _ in range(20):
            with left_out():
                bar("many")

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logging.set_tqdm_hook(None) is None
