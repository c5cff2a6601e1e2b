from __future__ import annotations

import io

from rich.console import Console

from tierd_tools.progress import BarProgress, LineProgress, Progress, SilentProgress, for_stream


def run(progress: Progress) -> None:
    with progress.stage("packing", 3 << 20) as stage:
        for _ in range(3):
            stage.advance(1 << 20)
    progress.note("a [bold] note")


def test_a_log_gets_lines_with_bytes_share_and_speed() -> None:
    stream = io.StringIO()
    run(LineProgress(stream, every_s=0.0))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "packing: 3.0 MiB"
    assert [line.split(",")[0] for line in lines[1:4]] == [
        "packing: 1.0 MiB of 3.0 MiB (33 %)",
        "packing: 2.0 MiB of 3.0 MiB (67 %)",
        "packing: 3.0 MiB of 3.0 MiB (100 %)",
    ]
    assert lines[4].startswith("packing: 3.0 MiB of 3.0 MiB (100 %) in 0.0 s, ")
    assert lines[4].endswith("MB/s")
    assert lines[5] == "a [bold] note"


def test_a_log_is_not_flooded() -> None:
    stream = io.StringIO()
    run(LineProgress(stream, every_s=60.0))
    assert len(stream.getvalue().splitlines()) == 3


def test_a_terminal_gets_a_bar_with_bytes_speed_and_time() -> None:
    stream = io.StringIO()
    run(BarProgress(Console(file=stream, force_terminal=True, width=100)))
    text = stream.getvalue()
    assert "packing" in text
    assert "3.0/3.0 MiB" in text
    assert "/s" in text
    assert "0:00:00" in text
    assert "a [bold] note" in text


def test_a_stage_without_bytes_is_shown_too() -> None:
    stream = io.StringIO()
    for progress in (LineProgress(stream), BarProgress(Console(file=stream)), SilentProgress()):
        with progress.stage("verifying", 0):
            pass
    assert "verifying: 0.0 MiB of 0.0 MiB (100 %)" in stream.getvalue()


def test_a_stream_that_is_no_terminal_gets_lines() -> None:
    assert isinstance(for_stream(io.StringIO()), LineProgress)
