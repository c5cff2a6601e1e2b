from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from tierd_client.gpu.events import CudaFence, DeviceFence

if TYPE_CHECKING:
    import pytest


def test_a_fence_is_an_event_in_the_current_stream_of_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Any] = []

    class Event:
        def record(self, stream: Any) -> None:
            calls.append(("record", stream))

        def query(self) -> bool:
            calls.append("query")
            return False

        def synchronize(self) -> None:
            calls.append("synchronize")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    fence = CudaFence(torch.device("cuda", 1))
    assert calls == [("record", "stream of cuda:1")]
    assert fence.passed() is False
    fence.wait()
    assert calls[1:] == ["query", "synchronize"]


def test_a_fence_behind_all_streams_waits_for_the_device_once_when_it_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    fence = DeviceFence(torch.device("cuda", 1))
    assert waits == []
    assert fence.passed()
    fence.wait()
    assert waits == [torch.device("cuda", 1)]
