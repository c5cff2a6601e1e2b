"""`tierctl doctor` as a whole, on a machine without CUDA packages."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tierd_tools import random_pack, tierctl
from tierd_tools.doctor import nvidia, round_trip
from tierd_tools.doctor.finding import Diagnosis, Finding, show
from tierd_tools.gpu_ground import wait_ready
from tierd_tools.serving import serve

if TYPE_CHECKING:
    from pathlib import Path

WITHOUT_GPU = nvidia.Nvidia((), None, nvidia.Started(problem="libcuda.so.1: not found"))


@pytest.fixture(autouse=True)
def _nobody_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a daemon nor a GPU of the machine that runs the tests."""
    monkeypatch.setenv("TIERD_SOCKET", str(tmp_path / "nobody.sock"))
    monkeypatch.setattr(nvidia, "look", lambda: WITHOUT_GPU)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def examine(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any]]:
    """The exit status, and the findings by name."""
    status = tierctl.main(["doctor", "--json", *flags])
    reply = json.loads(capsys.readouterr().out)
    return status, {finding["name"]: finding for finding in reply["findings"]}


def test_without_daemon_and_gpu_it_says_what_works_and_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, found = examine(capsys)
    assert status == 0
    assert found["memfd"]["verdict"] == "works"
    assert "read in another process (writing was refused)" in found["memfd"]["text"]
    for name in ("cuda_vmm on GPU 0", "cuda_ipc on GPU 0", "NVIDIA driver", "socket"):
        assert found[name]["verdict"] == "does not work"
        assert found[name]["text"]
        assert found[name]["advice"]
    assert found["O_DIRECT"]["verdict"] == "unknown"
    assert {"2 MiB pages", "pinning", "memory limit", "/dev/shm", "systemd"} <= set(found)


@pytest.mark.parametrize(
    ("flags", "failed"),
    [
        (["--gpu", "0"], "cuda_vmm on GPU 0"),
        (["--packs", "/no/such/directory"], "O_DIRECT in /no/such/directory"),
        (["--socket", "/no/such/socket"], "socket"),
    ],
)
def test_what_is_asked_for_and_does_not_work_is_exit_status_1(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    failed: str,
) -> None:
    def tried(kind: str, number: int, *, needed: bool) -> Finding:
        if kind == "memfd":
            return Finding(kind, "works", "quickly", needed=needed)
        return Finding(f"{kind} on GPU {number}", "does not work", "none", "buy one", needed)

    monkeypatch.setattr(round_trip, "finding", tried)
    status, found = examine(capsys, *flags)
    assert status == 1
    assert [name for name, finding in found.items() if finding["needed"] and failed == name]
    assert found[failed]["verdict"] == "does not work"


def test_a_daemon_that_answers_names_its_packs_and_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random_pack.write(tmp_path / "packs" / "one", 1, 4096)
    flags = ["--models", str(tmp_path / "packs"), "--dram", "64MiB"]
    flags += ["--gpu", "0=16MiB", "--gpu-device", "memfd"]
    with serve(flags, tmp_path / "log") as daemon:
        wait_ready(daemon.socket)
        status, found = examine(capsys, "--socket", daemon.socket)
    assert status == 0
    assert found["gpu:0 of the daemon"]["text"] == "memfd, shared memory"
    assert found["socket"]["verdict"] == "works"
    assert found[f"O_DIRECT in {tmp_path / 'packs'}"]["verdict"] in ("works", "does not work")


@pytest.mark.parametrize("flags", [["--socket", ""], ["--gpu", "-1"]])
def test_nonsense_is_usage(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert tierctl.main(["doctor", *flags]) == 2
    assert flags[0] in capsys.readouterr().err


def test_people_read_a_line_for_each_thing_and_what_to_do_below_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    diagnosis = Diagnosis(
        (
            Finding("one", "works", "it was tried"),
            Finding("two", "does not work", "no such thing", "get one", needed=True),
            Finding("three", "unknown", "nobody says"),
        )
    )
    show(diagnosis.as_reply())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "one    works: it was tried"
    assert lines[1] == "two    does not work, and is NEEDED: no such thing"
    assert lines[2].strip() == "-> get one"
    assert lines[-1].startswith("1 work, 1 do not, 1 are unknown; tierd needs what does not work")
