from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tierd.config import Config, load
from tierd.errors import ConfigError
from tierd.settings import SETTINGS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SERVE = ["--models", "/packs", "--socket", "/s"]


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "tierd.toml"


def from_toml(toml: Path, text: str, argv: Sequence[str] = SERVE, **environ: str) -> Config:
    toml.write_text(text)
    return load([*argv, "--config", str(toml)], environ)


def refusal(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(argv, environ or {})
    return str(caught.value)


def toml_refusal(toml: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        from_toml(toml, text)
    assert str(toml) in str(caught.value)
    return str(caught.value)


def test_defaults_serve() -> None:
    config = load(SERVE, {})
    assert config.models == (Path("/packs"),)
    assert config.packs == ()
    assert config.dram_bytes is None
    assert config.ssd_bandwidth is None
    assert (config.readers, config.reads_in_flight, config.max_clients) == (4, 2, 64)
    assert (config.populate, config.mlock, config.log_level) == (True, "auto", "info")
    assert (config.socket, config.socket_mode) == ("/s", 0o660)
    assert not config.check_config


def test_flags_are_above_the_environment_above_toml_above_defaults(toml: Path) -> None:
    text = 'readers = 5\ndram = "1GiB"\nlog_level = "debug"\n'
    config = from_toml(toml, text, [*SERVE, "--readers", "7"], TIERD_READERS="6", TIERD_DRAM="2GiB")
    assert (config.readers, config.dram_bytes, config.log_level) == (7, 2 << 30, "debug")
    assert config.reads_in_flight == 2
    assert {key: config.sources[key] for key in ("readers", "dram", "log_level", "mlock")} == {
        "readers": "flag --readers",
        "dram": "environment TIERD_DRAM",
        "log_level": f"file {toml}",
        "mlock": "default",
    }


def test_an_empty_variable_counts_as_not_set(toml: Path) -> None:
    assert from_toml(toml, "readers = 5", TIERD_READERS="").readers == 5


def test_the_file_may_come_from_the_environment(toml: Path) -> None:
    toml.write_text('models = ["/m"]\nsocket = "/t"\n')
    assert load([], {"TIERD_CONFIG": str(toml)}).models == (Path("/m"),)


def test_every_setting_has_a_flag_a_variable_and_a_key(toml: Path, tmp_path: Path) -> None:
    """The same values three ways; a setting that is left out of this test fails it."""
    values: dict[str, tuple[list[str], str, str, Any]] = {
        "models": (["--models", "/a", "--models", "/b"], "/a:/b", '["/a", "/b"]', ["/a", "/b"]),
        "packs": (["--pack", "/p"], "/p", '["/p"]', ["/p"]),
        "dram": (["--dram", "1.5GB"], "1.5GB", "1500000000", 1_500_000_000),
        "gpus": (
            ["--gpu", "0=1GiB", "--gpu", "2=512MiB"],
            "0=1GiB,2=512MiB",
            '["0=1GiB", "2=512MiB"]',
            ["0=1073741824", "2=536870912"],
        ),
        "gpu_device": (["--gpu-device", "memfd"], "memfd", '"memfd"', "memfd"),
        "gpu_chunk": (["--gpu-chunk", "4MiB"], "4MiB", "4194304", 4 << 20),
        "gpu_copies_in_flight": (["--gpu-copies-in-flight", "3"], "3", "3", 3),
        "gpu_copy_bandwidth": (["--gpu-copy-bandwidth", "2GB/s"], "2GB", '"2GB/s"', 2 * 10**9),
        "gpu_copy_latency_us": (["--gpu-copy-latency-us", "50"], "50", "50", 50),
        "gpu_direct": (["--no-gpu-direct"], "no", "false", False),
        "socket": (["--socket", "/x"], "/x", '"/x"', "/x"),
        "socket_mode": (["--socket-mode", "0600"], "600", "0o600", "0600"),
        "ssd_bandwidth": (["--ssd-bandwidth", "2MB/s"], "2MB", '"2MB/s"', 2_000_000),
        "readers": (["--readers", "3"], "3", "3", 3),
        "reads_in_flight": (["--reads-in-flight", "3"], "3", "3", 3),
        "read_chunk": (["--read-chunk", "8MiB"], "8MiB", "8388608", 8 << 20),
        "convoy_wait": (["--convoy-wait", "30"], "30", "30", 30),
        "max_clients": (["--max-clients", "3"], "3", "3", 3),
        "weights": (
            ["--weight", "1000=300", "--weight", "default=50"],
            "1000=300,default=50",
            "{1000 = 300, default = 50}",
            {"1000": 300, "default": 50},
        ),
        "populate": (["--no-populate"], "no", "false", False),
        "mlock": (["--mlock", "off"], "off", '"off"', "off"),
        "log_level": (["--log-level", "error"], "error", '"error"', "error"),
    }
    assert list(values) == [setting.key for setting in SETTINGS]
    by_flag = load([word for flags, *_ in values.values() for word in flags], {})
    by_variable = load([], {f"TIERD_{key.upper()}": row[1] for key, row in values.items()})
    by_key = from_toml(toml, "\n".join(f"{key} = {row[2]}" for key, row in values.items()), [])
    for config, source in ((by_flag, "flag"), (by_variable, "environment"), (by_key, "file")):
        effective = config.effective()
        assert {row["key"]: row["value"] for row in effective} == {
            key: row[3] for key, row in values.items()
        }
        assert all(row["source"].startswith(source) for row in effective)


def test_paths_in_a_file_start_from_the_file_and_others_from_here(toml: Path) -> None:
    config = from_toml(toml, 'packs = ["sub/p", "/abs"]', ["--models", "m"], TIERD_SOCKET="/s")
    assert config.packs == (toml.parent / "sub/p", Path("/abs"))
    assert config.models == (Path.cwd() / "m",)


def test_the_socket_follows_the_rule_of_all_parts(tmp_path: Path) -> None:
    models = ["--models", "/m"]
    runtime = {"XDG_RUNTIME_DIR": str(tmp_path)}
    if not os.access("/run/tierd", os.W_OK):
        config = load(models, runtime)
        assert (config.socket, config.sources["socket"]) == (f"{tmp_path}/tierd.sock", "default")
        assert "no place for the socket" in refusal(models)
    config = load(models, {**runtime, "TIERD_SOCKET": "/e"})
    assert (config.socket, config.sources["socket"]) == ("/e", "environment TIERD_SOCKET")
    config = load([*models, "--socket", "/f"], {**runtime, "TIERD_SOCKET": "/e"})
    assert config.socket == "/f"


def test_a_socket_path_that_the_kernel_cannot_take_is_refused() -> None:
    text = refusal(["--models", "/m", "--socket", "/" + "x" * 200])
    assert text.startswith("flag --socket: socket: ")
    assert "107" in text


def test_nothing_to_serve_is_refused() -> None:
    assert "--models DIR or --pack DIR" in refusal(["--socket", "/s"])


def test_auto_is_a_budget() -> None:
    config = load([*SERVE, "--dram", "auto"], {})
    assert config.dram_bytes is None
    assert {"key": "dram", "value": "auto", "source": "flag --dram"} in config.effective()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (
            ["--weight", "0=5", "--weight", "0=6"],
            "default=weight, weights from 1 to 10000, each once",
        ),
        (["--weight", "007=5"], "weights = ['007=5']: expected uid=weight"),
        (["--weight", "4294967295=5"], "weights = ['4294967295=5']: expected uid=weight"),
        (["--gpu", "20GiB"], "expected N=SIZE, like '0=20GiB'"),
        (["--gpu", "00=20GiB"], "expected N=SIZE"),
        (["--gpu", "0=1GiB", "--gpu", "0=2GiB"], "GPU 0 is there twice"),
        (["--gpu", "0=lots"], "'lots' is not a size"),
        (
            ["--gpu", "0=1MiB"],
            "gpu:0 is 1048576 bytes, at least one chunk of 2097152 bytes",
        ),
        (["--gpu", "0=1GiB", "--gpu-chunk", "3MiB"], "expected a power of 2 from 2MiB to 1GiB"),
        (["--gpu", "0=1GiB", "--gpu-chunk", "2GiB"], "expected a power of 2 from 2MiB to 1GiB"),
        (["--gpu", "0=1GiB", "--gpu-device", "cuda"], "expected one of cuda_vmm, cuda_ipc, memfd"),
        (["--gpu-direct"], "flag --gpu-direct: gpu_direct has no effect without a GPU"),
        (
            ["--gpu", "0=1GiB", "--gpu-device", "memfd", "--gpu-direct"],
            "gpu_direct: cuFile reads into the memory of GPUs, gpu_device is memfd",
        ),
        (["--gpu-device", "memfd"], "flag --gpu-device: gpu_device has no effect without a GPU"),
        (
            ["--gpu", "0=1GiB", "--gpu-copy-latency-us", "5"],
            "gpu_copy_latency_us is for gpu_device memfd only; it is cuda_vmm",
        ),
        (
            ["--gpu", "0=1GiB", "--gpu-copy-bandwidth", "1GB"],
            "flag --gpu-copy-bandwidth: gpu_copy_bandwidth is for gpu_device memfd only",
        ),
        (["--dram", "4G"], "flag --dram: dram = '4G': '4G' has no unit that is known"),
        (["--dram", "0"], "'0' is 0 bytes"),
        (["--dram", "lots"], "'lots' is not a size"),
        (["--dram", "-1GiB"], "--dram"),
        (["--ssd-bandwidth", "fast"], "'fast' is not a size"),
        (["--readers", "0"], "flag --readers: readers = '0': expected a number from 1 to 64"),
        (["--readers", "65"], "from 1 to 64"),
        (["--readers", "2.5"], "expected a whole number"),
        (["--max-clients", "9999"], "from 1 to 4096"),
        (["--socket-mode", "999"], "expected an octal mode like '0660'"),
        (["--socket-mode", "1777"], "expected an octal mode"),
        (["--mlock", "yes"], "expected one of auto, off"),
        (["--log-level", "loud"], "expected one of debug, info, warning, error"),
        (["--models", ""], "expected a list of directories"),
        (["--socket", ""], "expected a path"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--reader", "3"], "unrecognized arguments: --reader"),  # no abbreviations
        (["extra"], "unrecognized arguments: extra"),
        (["--dram"], "expected one argument"),
    ],
)
def test_a_flag_that_cannot_be_used_is_refused_by_name(flags: list[str], text: str) -> None:
    assert text in refusal([*SERVE, *flags])


def test_a_variable_that_cannot_be_used_is_refused_by_name() -> None:
    text = refusal(SERVE, {"TIERD_POPULATE": "perhaps"})
    assert text == "environment TIERD_POPULATE: populate = 'perhaps': expected true or false"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("reeders = 4", "unknown key 'reeders'; known are models, packs, dram"),
        ('gpus = "0=1GiB"', "gpus = '0=1GiB': expected a list"),
        ("gpus = [1]", "gpus = [1]: expected N=SIZE"),
        ("[tierd]\nreaders = 4", "unknown key 'tierd'"),
        ('readers = "4"', "readers = '4': expected a whole number"),
        ("readers = 4.0", "readers = 4.0: expected a whole number"),
        ("readers = true", "readers = True: expected a whole number"),
        ("readers = 0", "readers = 0: expected a number from 1 to 64"),
        ("dram = true", "dram = True: expected a text or a whole number"),
        ("dram = 0", "dram = 0: 0 is 0 bytes"),
        ('dram = "4 gigs"', "'4 gigs' has no unit"),
        ('models = "/m"', "models = '/m': expected a list"),
        ("models = [1]", "models = [1]: expected a list of directories"),
        ('populate = "yes"', "populate = 'yes': expected true or false"),
        ("socket_mode = 0o7777", "expected an octal mode"),
        ("mlock = false", "mlock = False: expected a text"),
        ("readers = ", "is not valid TOML"),
        ("readers = 4\nreaders = 5", "is not valid TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_file_and_key(
    toml: Path, line: str, text: str
) -> None:
    assert text in toml_refusal(toml, line)


def test_a_file_that_is_not_text_or_not_there_is_refused_by_name(toml: Path) -> None:
    assert refusal([*SERVE, "--config", str(toml)]) == f"{toml}: No such file or directory"
    toml.write_bytes(b"\xff\xfe")
    assert f"{toml} is not valid TOML" in refusal([*SERVE, "--config", str(toml)])


def test_a_value_that_is_overruled_must_be_right_all_the_same(toml: Path) -> None:
    toml.write_text("readers = 100")
    assert "readers = 100" in refusal([*SERVE, "--readers", "4", "--config", str(toml)])


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_print_and_leave(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load([flag], {})
    assert caught.value.code == 0
    out = capsys.readouterr().out
    if flag == "--help":
        assert all(setting.flag in out for setting in SETTINGS)
    else:
        assert out.startswith("tierd 0.")


def test_check_config_is_a_wish_and_no_setting() -> None:
    config = load([*SERVE, "--check-config"], {})
    assert config.check_config
    assert [row["key"] for row in config.effective()] == [setting.key for setting in SETTINGS]


def test_directories_that_are_not_there_are_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path / "none", file):
        with pytest.raises(ConfigError, match=f"models: '{path}' is not a directory.*--models"):
            load(["--models", str(path), "--socket", "/s"], {}).check_paths()
    with pytest.raises(ConfigError, match=f"packs: '{tmp_path}' is not a pack: it has no tierd"):
        load(["--pack", str(tmp_path), "--socket", "/s"], {}).check_paths()
    (tmp_path / "tierd.json").touch()
    arguments = ["--pack", str(tmp_path), "--models", str(tmp_path.parent), "--socket", "/s"]
    load(arguments, {}).check_paths()
    with pytest.raises(ConfigError, match=f"models: '{tmp_path}' is itself a pack: .*--pack"):
        load(["--models", str(tmp_path), "--socket", "/s"], {}).check_paths()
