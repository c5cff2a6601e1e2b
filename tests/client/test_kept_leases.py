"""Models on a real daemon that keep their leases while memory is not short, and what ends that."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.daemon.conftest import RunningDaemon
from tierd_client import Client, attendant, load_model
from tierd_tools.pack import pack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {"hidden_size": 600, "intermediate_size": 1800, "vocab_size": 90}
SIZES |= {"num_hidden_layers": 8, "num_attention_heads": 3, "num_key_value_heads": 1}
IDS = torch.arange(3, 8).view(1, 5)
#: Of each pack 25 MiB; one layer has 2.8.
ONE_FITS, BOTH_FIT = "36MiB", "80MiB"


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    torch.manual_seed(5)
    config = LlamaConfig(**SIZES, dtype=torch.bfloat16, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "source")
    pack(folder / "source", folder / "packs" / "first", prune="magnitude", sparsity=0.5)
    shutil.copytree(folder / "packs" / "first", folder / "packs" / "second")
    return folder / "packs"


@pytest.fixture
def start(packs: Path, tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Starts a daemon with a budget; returns its socket."""
    daemons: list[RunningDaemon] = []

    def start(budget: str) -> str:
        flags = ["--models", str(packs), "--dram", budget]
        daemons.append(RunningDaemon(str(tmp_path / "tierd.sock"), tmp_path / "log", flags))
        daemons[-1].wait_ready()
        return daemons[-1].socket

    yield start
    for daemon in daemons:
        daemon.kill()


@pytest.fixture(autouse=True)
def never_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine is no model that idles."""
    monkeypatch.setattr(attendant, "QUIET_S", 3600.0)


def run(model: Any, passes: int = 1) -> None:
    with torch.no_grad():
        for _ in range(passes):
            model(IDS)


def leases_of(operator: Client) -> list[int]:
    return [row["leases"] for row in operator.ask("clients")["clients"] if row["leases"]]


def asked(model: Any) -> int:
    leases: int = model.tierd.statistics().leases
    return leases


def test_a_model_that_fits_asks_for_nothing_after_its_first_pass(
    start: Callable[[str], str],
) -> None:
    model = load_model("first", "dense", start(ONE_FITS))
    with model.tierd:
        run(model, 2)
        before = asked(model)
        sent: list[bytes] = []
        connection = model.tierd.leases.opened.connection
        send = connection._send

        def noting(frame: bytes) -> None:
            sent.append(frame)
            send(frame)

        connection._send = noting
        run(model, 5)
        assert asked(model) == before
        assert sent == []


def test_two_models_that_fit_together_both_keep_theirs(start: Callable[[str], str]) -> None:
    socket = start(BOTH_FIT)
    first, second = (load_model(name, "dense", socket) for name in ("first", "second"))
    with first.tierd, second.tierd:
        for model in (first, second):
            run(model, 2)
        before = asked(first), asked(second)
        for model in (first, second):
            run(model, 2)
        assert (asked(first), asked(second)) == before


def test_an_idle_model_gives_back_what_it_kept_when_a_second_one_needs_the_memory(
    start: Callable[[str], str],
) -> None:
    with Client(start(ONE_FITS)) as operator:
        first = load_model("first", "dense", operator.socket)
        with first.tierd:
            run(first, 2)
            assert sum(leases_of(operator)) > SIZES["num_hidden_layers"]
            began = time.monotonic()
            second = load_model("second", "dense", operator.socket)
            with second.tierd:
                run(second, 2)
                # Nobody waits for the 2 s after which a plan is refused, nor for a quiet model.
                assert max(leases_of(operator)) <= 3, time.monotonic() - began
                run(first, 2)  # and it goes on beside the other
                run(second)
            deadline = time.monotonic() + 20
            while first.tierd.leases.opened.pressed:  # the second one is gone
                assert time.monotonic() < deadline
                time.sleep(0.01)
            run(first, 2)
            before = asked(first)
            run(first, 2)
            assert asked(first) == before


def test_a_model_that_computes_gives_back_what_it_kept_too(start: Callable[[str], str]) -> None:
    with Client(start(ONE_FITS)) as operator:
        first = load_model("first", "dense", operator.socket)
        with first.tierd:
            run(first, 2)
            operator.ask("budget", tier="dram", bytes=16 << 20)
            before = asked(first)
            run(first, 3)
            assert asked(first) > before + SIZES["num_hidden_layers"]
            dram = operator.ask("status")["dram"]
            assert dram["used_bytes"] <= dram["budget_bytes"] == 16 << 20
