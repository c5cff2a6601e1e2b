"""The command: exit statuses, one line on stderr, a light start."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon.conftest import wait_until, write_pack
from tierd.io.memory_limits import available_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.daemon.conftest import RunningDaemon

MIB = 1 << 20


def tierd(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tierd", *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_version_is_printed() -> None:
    done = tierd("--version")
    assert done.returncode == 0
    assert re.fullmatch(r"tierd \d+\.\d+\.\d+\n", done.stdout)


def test_an_unknown_flag_is_a_usage_error_of_one_line() -> None:
    done = tierd("--modles", "x")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--modles" in done.stderr


def test_a_missing_directory_of_packs_is_a_usage_error_that_names_it(tmp_path: Path) -> None:
    done = tierd("--models", tmp_path / "nowhere", "--socket", tmp_path / "s")
    assert done.returncode == 2
    assert "nowhere" in done.stderr


def test_a_pack_given_as_a_directory_of_packs_is_a_usage_error_that_says_how(
    models: Path, tmp_path: Path
) -> None:
    pack = write_pack(models / "one")
    done = tierd("--models", pack.path, "--socket", tmp_path / "s", "--check-config")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{str(pack.path)!r} is itself a pack" in done.stderr
    assert "--pack" in done.stderr


def test_check_config_prints_every_value_with_its_source_and_serves_nothing(
    models: Path, tmp_path: Path
) -> None:
    done = tierd("--models", models, "--dram", "1GiB", "--socket", tmp_path / "s", "--check-config")
    assert done.returncode == 0
    assert f"dram = {1 << 30}  # flag --dram" in done.stdout
    assert "readers = 4  # default" in done.stdout
    assert not (tmp_path / "s").exists()


def test_a_daemon_without_a_pack_starts_and_says_where_it_looked(
    start_daemon: Callable[..., RunningDaemon], models: Path
) -> None:
    daemon = start_daemon("--models", models, "--dram", "16MiB")
    wait_until(lambda: "nothing is served yet" in daemon.log_text(), "the warning")
    assert f"no sound pack in {models};" in daemon.log_text()


def test_a_budget_above_what_is_free_is_refused_with_both_numbers(
    models: Path, tmp_path: Path
) -> None:
    done = tierd("--models", models, "--dram", "1000TiB", "--socket", tmp_path / "s")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tierd: ")
    assert str(1000 << 40) in last
    assert "available" in last
    assert not (tmp_path / "s").exists()


def test_a_socket_in_a_missing_directory_is_a_failure_that_names_it(
    models: Path, tmp_path: Path
) -> None:
    path = tmp_path / "gone" / "tierd.sock"
    done = tierd("--models", models, "--dram", "16MiB", "--socket", path)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"tierd: the socket {path}: No such file or directory: {path.parent}"


def test_a_socket_where_another_file_is_fails_and_keeps_the_file(
    models: Path, tmp_path: Path
) -> None:
    path = tmp_path / "notes"
    path.write_text("mine")
    done = tierd("--models", models, "--dram", "16MiB", "--socket", path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"tierd: the socket {path}: exists and is no socket"
    assert path.read_text() == "mine"


@pytest.mark.slow
def test_a_daemon_answers_soon_and_stays_small_whatever_its_budget(
    start_daemon: Callable[..., RunningDaemon], models: Path
) -> None:
    for number in range(3):
        write_pack(models / f"m{number}", seed=number)
    budget = min(8 << 30, available_bytes().nbytes // 2)  # a small machine refuses 8 GiB
    daemon = start_daemon("--models", models, "--dram", str(budget), wait=False)

    def answers() -> bool:
        try:
            daemon.status()
        except OSError:
            return False
        return True

    wait_until(answers, "the daemon answers")
    # Processor time, because other tests may have the cores: alone it is the time that passes.
    running_ns = int(Path(f"/proc/{daemon.pid}/schedstat").read_text().split()[0])
    assert running_ns < 1.5e9
    status = daemon.status()
    assert status["daemon"]["rss_bytes"] < 80 * MIB
    assert "torch" not in Path(f"/proc/{daemon.pid}/maps").read_text()
