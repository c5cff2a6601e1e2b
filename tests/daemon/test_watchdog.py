"""The watchdog is pinged while the readers live; a device that is silent is only reported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import pytest

from tierd import sdnotify
from tierd.watchdog import Watchdog

if TYPE_CHECKING:
    import asyncio


class Readers:
    """What the watchdog looks at."""

    lives = True

    def __init__(self) -> None:
        self.devices: dict[int, str] = {}

    def alive(self) -> bool:
        return self.lives

    def silent(self) -> dict[int, str]:
        return self.devices


class Loop:
    """Keeps what is to be called next."""

    def call_later(self, seconds: float, call: Any, *arguments: Any) -> None:
        self.next = (seconds, lambda: call(*arguments))


@pytest.fixture
def pings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    sent: list[str] = []
    monkeypatch.setattr(sdnotify, "notify", lambda text, *, environ: sent.append(text))
    return sent


class Gpus:
    """The tiers, as the watchdog sees them."""

    lives = True

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def alive(self) -> bool:
        return self.lives

    def silent(self) -> dict[str, str]:
        return self.texts


def watch(readers: Readers, loop: Loop, gpus: Gpus | None = None) -> Watchdog:
    arguments = cast("asyncio.AbstractEventLoop", loop), cast("Any", readers)
    return Watchdog(*arguments, cast("Any", gpus))


def test_nobody_is_pinged_unless_systemd_watches(
    pings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    loop = Loop()
    watch(Readers(), loop).start()
    assert pings == []
    assert not hasattr(loop, "next")


def test_pings_go_on_while_the_readers_live_and_a_device_is_silent(
    pings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdnotify, "watchdog_interval_s", lambda environ: 7.0)
    readers, loop = Readers(), Loop()
    watch(readers, loop).start()
    assert pings == ["WATCHDOG=1"]
    readers.devices = {5: "the device of pack 'a' has not answered for 99 s"}
    assert loop.next[0] == 7.0
    loop.next[1]()
    assert pings == ["WATCHDOG=1"] * 2
    readers.lives = False
    loop.next[1]()
    assert pings == ["WATCHDOG=1"] * 2
    readers.lives = True
    loop.next[1]()
    assert pings == ["WATCHDOG=1"] * 3


def test_a_silent_device_is_logged_once_and_once_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    readers = Readers()
    dog = watch(readers, Loop())
    for _ in range(3):
        readers.devices = {5: "the device of pack 'a' is silent"}
        dog.look()
    readers.devices = {}
    dog.look()
    dog.look()
    assert [record.message for record in caplog.records] == [
        "the device of pack 'a' is silent",
        "device 5 answers again",
    ]


def test_a_gpu_that_is_silent_is_reported_and_one_whose_thread_ended_ends_the_pings(
    pings: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sdnotify, "watchdog_interval_s", lambda environ: 7.0)
    gpus, loop = Gpus(), Loop()
    gpus.texts = {"gpu:1": "gpu:1 has not answered for 12 s"}
    watch(Readers(), loop, gpus).start()
    loop.next[1]()
    gpus.texts = {}
    loop.next[1]()
    assert pings == ["WATCHDOG=1"] * 3
    assert [record.message for record in caplog.records] == [
        "gpu:1 has not answered for 12 s",
        "gpu:1 answers again",
    ]
    gpus.lives = False
    loop.next[1]()
    assert pings == ["WATCHDOG=1"] * 3
