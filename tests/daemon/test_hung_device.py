"""A device that never answers, in a real daemon: its packs wait, all others are served."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon.conftest import wait_until, write_pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.daemon.conftest import RawClient, RunningDaemon

LAYERS, LAYER_BYTES = 8, 256 << 10

#: `python -m tierd` in which reads of one device never return while a file exists.
_HANGING = """
import os, sys, time
from pathlib import Path
from tierd.io import ssd

really, device, while_exists = os.preadv, {device}, Path({flag!r})

def preadv(fd, targets, offset):
    while os.fstat(fd).st_dev == device and while_exists.exists():
        time.sleep(0.01)
    return really(fd, targets, offset)

os.preadv, ssd.SILENT_NS = preadv, 0
from tierd.__main__ import main
sys.exit(main())
"""


@pytest.fixture
def other_device(tmp_path: Path) -> Iterator[Path]:
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs to write to")
    with tempfile.TemporaryDirectory(prefix="tierd-test-", dir="/dev/shm") as folder:
        if os.stat(folder).st_dev == tmp_path.stat().st_dev:
            pytest.skip("one device only")
        yield Path(folder)


def test_a_device_that_hangs_stops_its_own_packs_only_until_it_answers(
    other_device: Path,
    tmp_path: Path,
    start_daemon: Callable[..., RunningDaemon],
    connect: Callable[..., RawClient],
) -> None:
    hung = write_pack(other_device / "hung", LAYERS, LAYER_BYTES)
    good = write_pack(tmp_path / "good", LAYERS, LAYER_BYTES)
    flag = tmp_path / "hang"
    flag.touch()
    program = _HANGING.format(device=other_device.stat().st_dev, flag=str(flag))
    daemon = start_daemon(
        "--pack",
        hung.path,
        "--pack",
        good.path,
        "--dram",
        "64MiB",
        "--readers",
        "1",
        program=("-c", program),
    )
    waiting, served = connect(daemon), connect(daemon)
    silent = waiting.open("hung")
    requests = [
        waiting.send("acquire", model_id=silent.model_id, layer=layer) for layer in range(LAYERS)
    ]
    opened = served.open("good")
    for layer in range(LAYERS):  # more of both than may be read at once
        assert opened.bytes_of(opened.acquire(layer)) == good.content[layer]
    note = "the device of pack 'hung' has not answered for"
    wait_until(lambda: any(note in text for text in daemon.status()["notes"]), "a note")
    assert not any("'good'" in text for text in daemon.status()["notes"] if note in text)
    flag.unlink()
    for layer, request in enumerate(requests):
        assert silent.bytes_of(waiting.receive(request)) == hung.content[layer]
    wait_until(lambda: not any(note in text for text in daemon.status()["notes"]), "no note")
    assert daemon.stop() == 0
