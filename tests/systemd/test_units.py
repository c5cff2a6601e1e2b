"""The units as systemd itself judges them. No systemd runs here: it only reads files."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tierd.config import load
from tierd.gpu_settings import MEMFD_ONLY
from tierd.settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

UNITS = Path(__file__).parents[2] / "systemd"
MOST_EXPOSURE = 20  # systemd-analyze counts in tenths: 2.0
EXEC_START = "/opt/tierd/bin/tierd --config /etc/tierd/tierd.toml"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units with a program that exists: verify looks for it, and there is no /opt/tierd."""
    for name in ("tierd.service", "tierd.socket"):
        text = (UNITS / name).read_text()
        if name == "tierd.service":
            assert f"ExecStart={EXEC_START}\n" in text
            text = text.replace(EXEC_START, shutil.which("true") or sys.executable)
        (tmp_path / name).write_text(text)
    return tmp_path


def values(file: str, key: str) -> Sequence[str]:
    """What is assigned to `key`, comments left out."""
    return re.findall(rf"^{key}=(.*)$", (UNITS / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ["tierd.service", "tierd.socket"])
def test_systemd_accepts_the_unit_without_a_word(units: Path, name: str) -> None:
    done = run("systemd-analyze", "verify", "--man=no", str(units / name))
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if "tierd" in line]
    assert ours == []


def test_verify_would_notice_a_mistake(units: Path) -> None:
    unit = units / "tierd.service"
    unit.write_text(unit.read_text().replace("Type=notify", "Type=notified"))
    assert "tierd.service" in run("systemd-analyze", "verify", "--man=no", str(unit)).stderr


def test_the_sandbox_leaves_little_exposed(units: Path) -> None:
    done = run(
        "systemd-analyze", "security", "--offline=yes", f"--threshold={MOST_EXPOSURE}",
        "--no-pager", str(units / "tierd.service"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def test_a_unit_without_the_sandbox_would_fail_that_test(units: Path) -> None:
    (units / "bare.service").write_text("[Service]\nExecStart=/bin/true\n")
    done = run(
        "systemd-analyze", "security", "--offline=yes", f"--threshold={MOST_EXPOSURE}",
        "--no-pager", str(units / "bare.service"),
    )  # fmt: skip
    assert done.returncode != 0


@pytest.fixture
def with_gpus(units: Path) -> Path:
    """The unit, and what a node with GPUs adds to it."""
    (units / "tierd.service.d").mkdir()
    text = (UNITS / "tierd.gpu.conf").read_text()
    (units / "tierd.service.d" / "gpu.conf").write_text(text)
    return units


def test_systemd_accepts_what_nodes_with_gpus_add_without_a_word(with_gpus: Path) -> None:
    done = run("systemd-analyze", "verify", "--man=no", str(with_gpus / "tierd.service"))
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if "tierd" in line] == []


def test_verify_would_notice_a_mistake_there_too(with_gpus: Path) -> None:
    added = with_gpus / "tierd.service.d" / "gpu.conf"
    added.write_text(added.read_text().replace("PrivateDevices=no", "PrivateDevice=no"))
    done = run("systemd-analyze", "verify", "--man=no", str(with_gpus / "tierd.service"))
    assert "gpu.conf" in done.stderr


def test_gpus_are_let_in_and_little_else(with_gpus: Path) -> None:
    """Devices are still closed but for those that are named."""
    assert values("tierd.service", "DevicePolicy") == ["closed"]
    allowed = values("tierd.gpu.conf", "DeviceAllow")
    assert {"char-nvidia rw", "char-nvidiactl rw", "char-nvidia-uvm rw"} <= set(allowed)
    assert all(device.startswith("char-nvidia") for device in allowed)
    done = run(
        "systemd-analyze", "security", "--offline=yes", f"--threshold={MOST_EXPOSURE}",
        "--no-pager", str(with_gpus / "tierd.service"),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("PrivateUsers", "no", "all peers would be nobody, so access could not be decided"),
        ("ProcSubset", "all", "/proc/meminfo would be hidden, so the budget could not be checked"),
        ("ProtectProc", "default", "start times of other users' processes would be hidden"),
        ("RuntimeDirectoryPreserve", "yes", "a stop would delete the socket of tierd.socket"),
        ("Type", "notify", "the daemon says when it is ready"),
        ("RestartPreventExitStatus", "2", "a wrong configuration would be tried ten times"),
    ],
)
def test_what_the_daemon_needs_is_not_hardened_away(key: str, value: str, reason: str) -> None:
    assert values("tierd.service", key) == [value], reason


def test_the_socket_is_where_clients_look_and_named_as_the_daemon_asks() -> None:
    assert values("tierd.socket", "ListenStream") == ["/run/tierd/tierd.sock"]
    assert values("tierd.socket", "FileDescriptorName") == ["control"]


def test_the_sandbox_does_not_stop_the_daemons_imports() -> None:
    """MemoryDenyWriteExecute by its kernel switch (PR_SET_MDWE, Linux 6.3), inherited by exec."""
    script = (
        "import ctypes, os, sys\n"
        "if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0): sys.exit(77)\n"
        "code = 'import uvloop, tierd.config, tierd.io.arena, tierd.io.ssd, tierd.io.process;'\n"
        "code += 'from tierd.io.arena import Arena; Arena.create(0, 2 << 20, chr(120)).close()'\n"
        "os.execv(sys.executable, [sys.executable, '-c', code])\n"
    )
    done = run(sys.executable, "-c", script)
    if done.returncode == 77:
        pytest.skip("this kernel has no PR_SET_MDWE")
    assert done.returncode == 0, done.stderr


def test_the_example_configuration_is_in_order() -> None:
    example = UNITS / "tierd.toml"
    config = load(["--config", str(example)], {})
    assert config.models == (Path("/var/lib/tierd/packs"),)
    assert config.socket == values("tierd.socket", "ListenStream")[0]
    assert config.dram_bytes is None


def test_the_example_configuration_names_every_setting_with_its_default(tmp_path: Path) -> None:
    """The commented lines, taken in, are valid and change nothing but those that show a value. A
    service has no use for what is for the memfd device alone."""
    text = (UNITS / "tierd.toml").read_text()
    everything = tmp_path / "tierd.toml"
    everything.write_text(re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE))
    config = load(["--config", str(everything)], {})
    for key, source in config.sources.items():
        assert source.startswith("file") or key in MEMFD_ONLY, key
    defaults = load(["--models", "/m", "--socket", "/s"], {})
    shown = {"models", "packs", "socket", "gpus", "ssd_bandwidth"}
    for setting in SETTINGS:
        if setting.key not in shown:
            name = "dram_bytes" if setting.key == "dram" else setting.key
            assert getattr(config, name) == getattr(defaults, name), setting.key


def test_the_user_is_declared_as_systemd_expects() -> None:
    done = run("systemd-sysusers", "--dry-run", str(UNITS / "tierd.sysusers"))
    if "unrecognized option" in done.stderr:
        pytest.skip("systemd-sysusers has no --dry-run (before 250)")
    assert done.returncode == 0, done.stderr
    assert values("tierd.service", "User") == ["tierd"]


def test_the_tmpfiles_line_is_read_and_asks_for_huge_pages() -> None:
    """With a prefix that nothing has, the file is parsed and nothing is done."""
    file = UNITS / "tierd.tmpfiles.conf"
    lines = [line.split() for line in file.read_text().splitlines() if not line.startswith("#")]
    assert [
        "w", "/sys/kernel/mm/transparent_hugepage/shmem_enabled", "-", "-", "-", "-", "advise",
    ] in lines  # fmt: skip
    done = run("systemd-tmpfiles", "--create", "--prefix=/nowhere", str(file))
    complaints = [line for line in done.stderr.splitlines() if "tierd.tmpfiles.conf" in line]
    assert [line for line in complaints if "user" not in line.lower()] == []


def test_a_folder_of_units_holds_what_the_readme_installs() -> None:
    readme = (UNITS / "README.md").read_text()
    named = set(re.findall(r"systemd/(tierd\.[a-z.]+)", readme))
    assert named == {entry.name for entry in UNITS.iterdir()} - {"README.md"}
