"""The probes themselves, over a CUDA driver that is played: so they run when a GPU is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon.played_cufile import build
from tests.gpu.probes import MARK
from tests.gpu.talk import Probe
from tests.gpu.test_probe_vmm import client
from tierd.gpu_settings import PLAYED_VARIABLE

if TYPE_CHECKING:
    from tests.gpu.conftest import Record

NBYTES = 4 << 20


@pytest.fixture(autouse=True)
def _played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "fake_cuda" / "site"))


def test_a_client_reads_what_the_owner_wrote_and_its_write_is_refused() -> None:
    with Probe("vmm_owner", NBYTES) as owner:
        about = owner.hear()
        assert about["granularity"] > 0
        found = client(owner.talk.fds[0], "ro", "copy", NBYTES)
        assert found["mark"] == MARK.hex()
        assert found["write"].startswith("refused")
        owner.say("read")
        assert owner.hear() == MARK.hex()


def test_a_write_that_is_not_refused_is_told() -> None:
    with Probe("vmm_owner", NBYTES) as owner:
        owner.hear()
        found = client(owner.talk.fds[0], "rw", "copy", NBYTES)
        assert found["write"] == "succeeded"
        owner.say("read")
        assert owner.hear() != MARK.hex()


def test_a_probe_that_fails_says_why() -> None:
    with Probe("vmm_owner", 12345) as owner, pytest.raises(RuntimeError, match="CUDA_ERROR"):
        owner.hear()


def test_an_owner_that_was_killed_leaves_its_descriptor() -> None:
    with Probe("vmm_owner", NBYTES) as owner:
        owner.hear()
        owner.kill()
        found = client(owner.talk.fds[0], "ro", "read", NBYTES)
    assert found["mark"] == MARK.hex()


@pytest.mark.parametrize("kind", ["cuda_vmm", "cuda_ipc"])
@pytest.mark.parametrize("way", ["direct", "through DRAM", "not at all"])
def test_reads_past_dram_are_counted_or_refused(
    kind: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLAYED_VARIABLE, str(build(tmp_path)))
    if way != "direct":
        monkeypatch.setenv(*{"through DRAM": ("FAKE_POSIX", "1")}.get(way, ("FAKE_OPEN", "5001")))
    (tmp_path / "file").write_bytes(os.urandom(9 << 20))
    with Probe("direct_read", kind, tmp_path / "file") as probe:
        found = probe.hear()
    if way == "direct":
        assert found["direct_reads"] > 0
        assert found["posix_reads"] == 0
    else:
        said = {"through DRAM": "this is not direct"}.get(way, "nvidia-fs driver is not loaded")
        assert said in found["refused"]


def test_answers_are_written_down(
    record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERD_GPU_ANSWERS", str(tmp_path / "answers"))
    record("Is it so?", True)
    record("How much?", "3 ms")
    lines = (tmp_path / "answers").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == ["True", "3 ms"]
