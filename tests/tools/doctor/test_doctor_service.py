"""What the doctor says about the daemon and systemd."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tierd_tools.doctor import service

if TYPE_CHECKING:
    from pathlib import Path

STATUS: dict[str, Any] = {"daemon": {"version": "0.1", "pid": 42}}


def answering(**more: Any) -> service.Daemon:
    return service.Daemon("/run/tierd.sock", False, {**STATUS, **more}, {})


def machine(root: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], group: str) -> None:
    """A machine of systemd whose systemctl says what is given, and a daemon in a cgroup."""
    (root / "run/systemd/system").mkdir(parents=True)
    (root / "proc/42").mkdir(parents=True)
    (root / "proc/42/cgroup").write_text(f"0::/system.slice/{group}\n")
    monkeypatch.setattr(service, "_systemctl", lambda first, *rest: said.get(first))


def test_no_systemd_is_no_failure(tmp_path: Path) -> None:
    found = {f.name: f for f in service.findings(answering(), tmp_path)}
    assert found["socket"].verdict == "works"
    assert found["systemd"].verdict == "does not work"
    assert not found["systemd"].needed


@pytest.mark.parametrize(
    ("version", "kept", "said"),
    [
        ("systemd 252 (252.38-1)", "", "`systemctl stop` is not"),
        ("systemd 255 (255.4)", "no", "FileDescriptorStorePreserve=yes is possible"),
    ],
)
def test_what_the_version_of_systemd_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, kept: str, said: str
) -> None:
    machine(tmp_path, monkeypatch, {"--version": version, "show": kept}, "tierd.service")
    found = {f.name: f for f in service.findings(answering(), tmp_path)}
    assert said in found["systemd"].text
    assert found["as a service"].verdict == "works"
    assert bool(found["as a service"].advice) == (kept == "no")


def test_a_daemon_outside_the_unit_loses_its_memory_in_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, monkeypatch, {"--version": "systemd 255 (255)"}, "session-1.scope")
    found = {f.name: f for f in service.findings(answering(), tmp_path)}
    assert found["as a service"].verdict == "does not work"
    assert "runs outside tierd.service" in found["as a service"].text


def test_a_gpu_that_the_daemon_could_not_open_is_a_failure(tmp_path: Path) -> None:
    gpu = {"tier": "gpu:0", "device": "cuda_vmm", "state": "failed", "reason": "no driver"}
    found = {f.name: f for f in service.findings(answering(gpus=[gpu]), tmp_path)}
    assert found["gpu:0 of the daemon"].failed
    assert "no driver" in found["gpu:0 of the daemon"].text
    ready = {**gpu, "state": "ready", "name": "H100", "reason": None}
    found = {f.name: f for f in service.findings(answering(gpus=[ready]), tmp_path)}
    assert found["gpu:0 of the daemon"].verdict == "works"


def test_nobody_at_a_socket_matters_only_where_it_was_named(tmp_path: Path) -> None:
    assert service.daemon(str(tmp_path / "none.sock")).asked_for
    missing = service.Daemon("/run/tierd.sock", False, None, {}, "nobody")
    found = {f.name: f for f in service.findings(missing, tmp_path)}
    assert not found["socket"].failed
