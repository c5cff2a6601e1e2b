"""Models on GPU tiers of a real daemon: the CUDA kinds over a driver that is played by the host, in
the daemon and in the client, with a GPU that is never in a hurry."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.daemon.conftest import RunningDaemon
from tests.daemon.played_cufile import build
from tests.e2e.gpu_client import damaged_blocks
from tests.fake_cuda.driver import FakeDriver
from tests.fake_cuda.runtime import FakeRuntime
from tierd.gpu_settings import PLAYED_VARIABLE
from tierd_client import Client, load_model
from tierd_client.errors import ReadFailed, TierUnavailable, UnsupportedDevice
from tierd_client.gpu import cuda_driver, cuda_memory, dlpack, ipc_memory
from tierd_client.gpu.cuda_memory import CudaMemory
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.slow

KINDS = ["memfd", "cuda_vmm", "cuda_ipc"]
SITE = Path(__file__).parents[3] / "tests" / "fake_cuda" / "site"
CHUNK_BYTES = 2 << 20
FITS, DOES_NOT = 96 << 20, 12 << 20
IDS = torch.arange(3, 33).view(2, 15)
SIZES: dict[str, Any] = {"hidden_size": 600, "intermediate_size": 1800, "vocab_size": 90}
SIZES |= {"num_hidden_layers": 8, "num_attention_heads": 3, "num_key_value_heads": 1}
SIZES |= {"dtype": torch.bfloat16, "tie_word_embeddings": True}


class SlowFence:
    """The GPU is through with what lies before it when it was asked a few times."""

    made = 0
    waited = 0

    def __init__(self) -> None:
        type(self).made += 1
        self._left = 5

    def passed(self) -> bool:
        self._left -= 1
        return self._left < 0

    def wait(self) -> None:
        type(self).waited += 1
        self._left = 0


@pytest.fixture
def client_driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    """A driver in this process. What the client takes for a GPU's addresses are its own, so that
    torch computes there with the CPU."""
    driver, cpu = FakeDriver(), torch.device("cpu")
    gpu, real = torch.device("cuda", 0), dlpack.bytes_at

    def bytes_at(address: int, nbytes: int, device: torch.device, owner: Any) -> torch.Tensor:
        assert device == gpu
        return real(address, nbytes, cpu, owner)

    def place(described: Any, tier: str, device: str | None) -> torch.device:
        return cpu if described.kind == "memfd" else gpu

    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=FakeRuntime(driver)))
    monkeypatch.setattr("tierd_client.client.place", place)
    monkeypatch.setattr("tierd_client.source.place", place)
    monkeypatch.setattr(cuda_driver, "import_module", lambda name: driver)
    monkeypatch.setattr(ipc_memory, "import_module", lambda name: cupy)
    monkeypatch.setattr(cuda_memory, "bytes_at", bytes_at)
    monkeypatch.setattr(CudaMemory, "device", cpu)
    monkeypatch.setattr(
        CudaMemory,
        "buffer",
        lambda memory, offset, nbytes: memoryview(
            memory.tensor(torch.uint8, (nbytes,), (1,), offset).numpy()
        ),
    )
    monkeypatch.setattr(CudaMemory, "fence", lambda memory: SlowFence())
    monkeypatch.setattr(CudaMemory, "fence_all", lambda memory: SlowFence())
    monkeypatch.setattr(SlowFence, "made", 0)
    monkeypatch.setattr(SlowFence, "waited", 0)
    return driver


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("played")
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    model.save_pretrained(folder / "source")
    pack(folder / "source", folder / "packs" / "tiny", prune="magnitude", sparsity=0.5)
    unpack(folder / "packs" / "tiny", folder / "reference")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder / "reference"))


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Starts a daemon with one GPU of a kind and a budget, more flags and environment; returns its
    socket."""
    daemons: list[RunningDaemon] = []

    def start(kind: str, budget_bytes: int, *more: str, **environ: str) -> str:
        flags = ["--models", str(folder / "packs"), "--dram", "64MiB", "--gpu-device", kind]
        flags += ["--gpu", f"0={budget_bytes}", "--gpu-chunk", str(CHUNK_BYTES)]
        environment = {"PYTHONPATH": str(SITE), **environ}
        socket = str(tmp_path / "tierd.sock")
        daemons.append(RunningDaemon(socket, tmp_path / "log", [*flags, *more], environment))
        daemons[-1].wait_ready()
        return socket

    yield start
    for daemon in daemons:
        daemon.kill()


def load(socket: str) -> Any:
    return load_model("tiny", "dense", socket, tier="gpu:0")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def frames_sent(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Fills with what is sent from now on."""
    connection, sent = model.tierd.leases.opened.connection, []
    send = connection._send

    def noting(frame: bytes) -> None:
        sent.append(frame)
        send(frame)

    monkeypatch.setattr(connection, "_send", noting)
    return sent


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_fits_computes_the_right_bits_and_asks_for_nothing_after_its_first_pass(
    kind: str,
    start: Callable[[str, int], str],
    expected: torch.Tensor,
    client_driver: FakeDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load(start(kind, FITS))
    with model.tierd:
        assert torch.equal(logits(model), expected)
        logits(model)
        time.sleep(0.2)  # the scratch that it took is told
        sent, before = frames_sent(model, monkeypatch), model.tierd.statistics()
        for _ in range(3):
            assert torch.equal(logits(model), expected)
        after = model.tierd.statistics()
        assert after.kept - before.kept == after.entries - before.entries > 0
        assert sent == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_does_not_fit_computes_the_right_bits(
    kind: str,
    start: Callable[[str, int], str],
    expected: torch.Tensor,
    client_driver: FakeDriver,
) -> None:
    with Client(start(kind, DOES_NOT)) as operator:
        model = load(operator.socket)
        with model.tierd:
            for _ in range(3):
                assert torch.equal(logits(model), expected)
            if kind != "memfd":
                assert SlowFence.made > 3 * SIZES["num_hidden_layers"]
        (gpu,) = operator.ask("status")["gpus"]
        assert gpu["used_bytes"] <= DOES_NOT


@pytest.fixture(scope="module")
def cufile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("cufile"))


def tokens(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.generate(
            IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    return found


def when_nothing_is_read(operator: Client) -> dict[str, Any]:
    """The daemon's status once what it read ahead for a model that is gone has arrived."""
    deadline = time.monotonic() + 60
    while (status := operator.ask("status"))["gpus"][0]["in_flight_bytes"]:
        assert time.monotonic() < deadline, status["gpus"]
        time.sleep(0.01)
    return status


@pytest.mark.parametrize(
    ("kind", "budget_bytes"),
    [("cuda_vmm", FITS), ("cuda_vmm", DOES_NOT), ("cuda_ipc", DOES_NOT), ("memfd", DOES_NOT)],
)
def test_a_model_that_is_read_past_dram_writes_the_right_tokens(
    kind: str,
    budget_bytes: int,
    start: Callable[..., str],
    folder: Path,
    expected: torch.Tensor,
    client_driver: FakeDriver,
    cufile: Path,
) -> None:
    socket = start(kind, budget_bytes, "--gpu-direct", **{PLAYED_VARIABLE: str(cufile)})
    with Client(socket) as operator:
        model = load(socket)
        with model.tierd:
            assert torch.equal(logits(model), expected)
            reference = AutoModelForCausalLM.from_pretrained(folder / "reference")
            assert torch.equal(tokens(model), tokens(reference))
        status = when_nothing_is_read(operator)
    (gpu,), direct = status["gpus"], status["gpus"][0]["direct"]
    assert direct["layers"] > SIZES["num_hidden_layers"]
    assert direct["cufile_bytes"] == direct["bytes"]
    assert direct["cufile_posix_reads"] == 0
    assert (gpu["copied_bytes"], status["ssd"]["reads"]) == (0, 0)
    assert status["dram"]["resident_bytes"] == 0, "nothing passed DRAM"


def test_a_model_whose_reads_cufile_counts_as_not_direct_is_not_served_by_them(
    start: Callable[..., str], client_driver: FakeDriver, cufile: Path
) -> None:
    environment = {PLAYED_VARIABLE: str(cufile), "FAKE_POSIX": "1"}
    with Client(start("cuda_vmm", FITS, "--gpu-direct", **environment)) as operator:
        with pytest.raises(ReadFailed, match="this is not direct"):
            logits(load(operator.socket))
        (gpu,) = operator.ask("status")["gpus"]
        assert "this is not direct" in gpu["reason"]


@pytest.mark.parametrize("kind", ["memfd", "cuda_vmm"])
def test_memory_goes_back_while_a_model_idles_and_it_goes_on_afterwards(
    kind: str,
    start: Callable[[str, int], str],
    expected: torch.Tensor,
    client_driver: FakeDriver,
) -> None:
    with Client(start(kind, FITS)) as operator:
        model = load(operator.socket)
        with model.tierd:
            logits(model)
            before = len(client_driver.mappings)
            assert operator.ask("budget", tier="gpu:0", bytes=DOES_NOT)["budget_bytes"] == DOES_NOT
            deadline = time.monotonic() + 20
            while True:
                (gpu,) = operator.ask("status")["gpus"]
                if gpu["backed_bytes"] <= DOES_NOT and not gpu["above_budget_bytes"]:
                    break
                assert time.monotonic() < deadline, gpu
                time.sleep(0.02)
            if kind == "cuda_vmm":
                assert len(client_driver.mappings) <= DOES_NOT // CHUNK_BYTES < before
            for _ in range(2):
                assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["cuda_vmm", "cuda_ipc"])
def test_a_model_that_is_closed_leaves_nothing_with_the_driver(
    kind: str, start: Callable[[str, int], str], client_driver: FakeDriver
) -> None:
    model = load(start(kind, FITS))
    logits(model)
    assert kind == "cuda_ipc" or client_driver.live() != {}
    model.tierd.close()
    del model
    gc.collect()
    assert client_driver.live() == {}


@pytest.mark.parametrize("kind", ["cuda_vmm", "cuda_ipc"])
def test_a_write_in_place_is_impossible_or_seen_by_the_checksums(
    kind: str, start: Callable[[str, int], str], client_driver: FakeDriver
) -> None:
    with (
        Client(start(kind, FITS), tier="gpu:0") as client,
        client.lease("tiny", "model.layers.1") as lease,
    ):
        content = lease.mapping.tensor(torch.uint8, (lease.layer.nbytes,), (1,), lease.offset)
        assert damaged_blocks(bytes(content.numpy()), lease.layer) == []
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            content[7] ^= 1
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended == (-signal.SIGSEGV if kind == "cuda_vmm" else 0)
        damaged = damaged_blocks(bytes(content.numpy()), lease.layer)
        assert damaged == ([] if kind == "cuda_vmm" else [0])


def test_what_does_not_go_together_is_refused_before_a_model_is_made(
    start: Callable[[str, int], str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = start("memfd", FITS)
    with pytest.raises(TierUnavailable, match=r"gpu:7.*gpu:0"):
        load_model("tiny", socket=socket, tier="gpu:7")
    with pytest.raises(UnsupportedDevice, match="is unknown"):
        load_model("tiny", socket=socket, tier="gpu")
    monkeypatch.setenv("TIERD_GPU_KERNELS", "torch")
    with pytest.raises(UnsupportedDevice, match='"fused" on cuda is refused'):
        load_model("tiny", "fused", socket, device="cuda")
    monkeypatch.setenv("TIERD_SOCKET", socket + "-nowhere")
    with pytest.raises(TierUnavailable, match="a private one has DRAM only"):
        load_model(folder / "packs" / "tiny", tier="gpu:0")


def test_a_real_gpu_is_refused_to_the_cpu(start: Callable[[str, int], str]) -> None:
    socket = start("cuda_vmm", FITS)
    with pytest.raises(UnsupportedDevice, match="'gpu:0' is a cuda_vmm device: the CPU cannot"):
        load_model("tiny", socket=socket, tier="gpu:0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_this_process_has_not_is_refused(start: Callable[[str, int], str]) -> None:
    socket = start("cuda_vmm", FITS)
    with (
        Client(socket, tier="gpu:0") as client,
        pytest.raises(UnsupportedDevice, match=r"tier 'gpu:0' is GPU .* its 0 CUDA GPU\(s\)"),
    ):
        client.open("tiny")
