"""Models that run through three tiers: SSD, DRAM and a GPU that is shared memory.

The reference is the model in memory; `compute="dense"` has its bits, so its tokens too.
"""

from __future__ import annotations

import gc
import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.daemon.conftest import Refused, RunningDaemon, wait_until
from tests.e2e.footprint import Footprint, memfd_bytes
from tests.e2e.model_processes import ModelProcess, ModelProcesses
from tierd_client.errors import DaemonGone
from tierd_client.load import load_model
from tierd_layouts.container import open_pack
from tierd_tools import random_model
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
TRAINED = ROOT.parent / "shared" / "models"
TIER = "gpu:0"
CHUNK_BYTES = 2 * MIB
CHUNKS = "tierd-gpu"
NEW_TOKENS = 6
MANY_LAYERS = random_model.Shape(
    hidden=384, intermediate=1024, layers=12, heads=6, kv_heads=2, vocabulary=1500
)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small matrices, and other processes at the same time: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A packed model, its reference in memory, and the tokens that it writes."""

    packs: Path
    name: str
    nbytes: int  #: of all layers
    layers: int
    prompt: torch.Tensor
    expected: list[int]

    def generate(self, model: Any) -> list[int]:
        with torch.no_grad():
            out = model.generate(
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        return [int(token) for token in out[0]]

    def load(self, daemon: RunningDaemon) -> Any:
        return load_model(self.name, "dense", daemon.socket, tier=TIER)


def source_of(name: str, folder: Path) -> Path:
    if name == "random-12-layers":
        random_model.write(folder / name, MANY_LAYERS)
        return folder / name
    if not (TRAINED / name / "config.json").is_file():
        pytest.skip(f"trained model {name} is not in ../shared/models")
    return TRAINED / name


def build(name: str, folder: Path) -> Case:
    source = source_of(name, folder)
    pack(source, folder / "packs" / name, codec="raw", prune="magnitude", sparsity=0.5)
    unpack(folder / "packs" / name, folder / "reference")
    model = AutoModelForCausalLM.from_pretrained(folder / "reference")
    layers = open_pack(folder / "packs" / name).layers
    generator = torch.Generator().manual_seed(7)
    prompt = torch.randint(3, 1000, (1, 12), generator=generator)
    total = sum(layer.nbytes for layer in layers)
    case = Case(folder / "packs", name, total, len(layers), prompt, [])
    case.expected.extend(case.generate(model))
    return case


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The case of that name, made when it is first asked for."""
    return lru_cache(lambda name: build(name, tmp_path_factory.mktemp(name)))


@pytest.fixture(params=["stdlib-llama-12m", "stdlib-opt-12m", "random-12-layers"])
def case(request: pytest.FixtureRequest, built: Callable[[str], Case]) -> Case:
    return built(request.param)


@pytest.fixture
def many_layers(built: Callable[[str], Case]) -> Case:
    """One chunk for each of 12 layers and an embedding."""
    return built("random-12-layers")


@contextmanager
def daemon_of(case: Case, folder: Path, gpu_bytes: int, dram_bytes: int) -> Iterator[RunningDaemon]:
    flags = ["--models", str(case.packs), "--dram", str(dram_bytes), "--gpu", f"0={gpu_bytes}"]
    flags += ["--gpu-device", "memfd", "--gpu-chunk", str(CHUNK_BYTES)]
    daemon = RunningDaemon(str(folder / "tierd.sock"), folder / "log", flags)
    try:
        daemon.wait_ready()
        yield daemon
    finally:
        daemon.kill()


def gpu_of(daemon: RunningDaemon) -> dict[str, Any]:
    (gpu,) = daemon.status()["gpus"]
    assert isinstance(gpu, dict)
    return gpu


def chunks_down(nbytes: float) -> int:
    return int(nbytes) // CHUNK_BYTES * CHUNK_BYTES


class Watched:
    """Looks again and again, while something runs, at what exists behind the GPU's arena."""

    def __init__(self, daemon: RunningDaemon) -> None:
        self.most_bytes = 0
        self._daemon = daemon
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.most_bytes = max(self.most_bytes, backed_bytes(self._daemon))


def backed_bytes(daemon: RunningDaemon) -> int:
    """Memory behind the chunks that the daemon has, or that this process maps."""
    return memfd_bytes((daemon.pid, os.getpid()), CHUNKS)


# ------------------------------------------------------------------------------------- right tokens


def test_a_model_three_times_the_gpu_and_half_again_the_dram_writes_the_right_tokens(
    case: Case, tmp_path: Path
) -> None:
    gpu_bytes, dram_bytes = chunks_down(case.nbytes / 3), chunks_down(case.nbytes / 1.5)
    with daemon_of(case, tmp_path, gpu_bytes, dram_bytes) as daemon:
        model = case.load(daemon)
        with model.tierd, Watched(daemon) as watched:
            assert case.generate(model) == case.expected
        status = daemon.status()
        (gpu,), dram = status["gpus"], status["dram"]
        assert 0 < watched.most_bytes <= gpu_bytes, "the budget of the GPU is all that it took"
        assert dram["peak_bytes"] <= dram["budget_bytes"] == dram_bytes
        # It really went through: more came from the SSD and to the GPU than fits at once.
        passes = NEW_TOKENS
        least = case.nbytes + (passes - 1) * (case.nbytes - dram_bytes - gpu_bytes)
        assert status["ssd"]["read_bytes"] >= least
        assert gpu["copied_bytes"] >= case.nbytes + (passes - 1) * (case.nbytes - gpu_bytes)
        wait_until(lambda: gpu_of(daemon)["leased_bytes"] == 0, "all leases are given back")


def test_a_model_that_fits_the_gpu_is_copied_once_and_asked_for_no_more(
    many_layers: Case, tmp_path: Path
) -> None:
    room = chunks_down(2 * many_layers.nbytes)
    with daemon_of(many_layers, tmp_path, room, room) as daemon:
        model = many_layers.load(daemon)
        with model.tierd:
            assert many_layers.generate(model) == many_layers.expected
            first, asked = daemon.status(), model.tierd.statistics().leases
            assert many_layers.generate(model) == many_layers.expected
            second = daemon.status()
            assert model.tierd.statistics().leases == asked, "kept leases cost no round trip"
        assert memfd_bytes((os.getpid(),), CHUNKS) == 0, "a closed model maps nothing"
        assert first["gpus"][0]["copied_bytes"] == many_layers.nbytes
        assert second["gpus"][0]["copied_bytes"] == many_layers.nbytes
        assert second["ssd"]["read_bytes"] == first["ssd"]["read_bytes"] == many_layers.nbytes


# ------------------------------------------------------------------------------ shared by processes


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelProcesses]:
    started = ModelProcesses(tmp_path_factory.mktemp("texts"))
    yield started
    started.close()


def taken_by(
    case: Case, folder: Path, processes: ModelProcesses, count: int
) -> tuple[int, int, int]:
    """Bytes behind the arena on the GPU, copied to it, and read from the SSD, by `count`."""
    folder.mkdir()
    room = chunks_down(2 * case.nbytes)
    with daemon_of(case, folder, room, room) as daemon:
        prompt = case.prompt[0].tolist()
        running = [
            processes.start(case.name, daemon.socket, prompt, NEW_TOKENS, texts=1)
            for _ in range(count)
        ]
        for process in running:
            assert process.wait_texts(1) == [case.expected]
        status = daemon.status()
        assert status["clients"] == count
        taken = backed_bytes(daemon), status["gpus"][0]["copied_bytes"], status["ssd"]["read_bytes"]
        for process in running:
            process.leave()
        wait_until(lambda: daemon.status()["clients"] == 0, "all clients are gone")
        assert gpu_of(daemon)["leased_bytes"] == 0
        return taken


def test_two_and_four_processes_take_the_memory_and_the_reads_of_one(
    many_layers: Case, tmp_path: Path, processes: ModelProcesses
) -> None:
    alone = taken_by(many_layers, tmp_path / "1", processes, 1)
    assert alone[2] == many_layers.nbytes
    for count in (2, 4):
        shared = taken_by(many_layers, tmp_path / str(count), processes, count)
        for what, theirs, ours in zip(("VRAM", "copied", "SSD"), shared, alone, strict=True):
            assert theirs <= 1.05 * ours, f"{what} of {count} processes"


def test_a_model_process_killed_while_it_computes_disturbs_no_other(
    many_layers: Case, tmp_path: Path, processes: ModelProcesses
) -> None:
    gpu_bytes, dram_bytes = chunks_down(many_layers.nbytes), chunks_down(many_layers.nbytes)
    with daemon_of(many_layers, tmp_path, gpu_bytes, dram_bytes) as daemon:
        prompt = many_layers.prompt[0].tolist()

        def start() -> ModelProcess:
            return processes.start(many_layers.name, daemon.socket, prompt, NEW_TOKENS)

        survivor, victims = start(), [start(), start()]
        for victim in victims:
            victim.wait_texts(1)
            victim.kill()
            wait_until(lambda: daemon.status()["clients"] < 3, "the daemon has forgotten it")
            seen = len(survivor.texts())
            assert all(text == many_layers.expected for text in survivor.wait_texts(seen + 2))
        wait_until(lambda: daemon.status()["clients"] == 1, "one is left")
        survivor.kill()
        wait_until(lambda: gpu_of(daemon)["leased_bytes"] == 0, "its leases have ended")


# --------------------------------------------------------------------------------------- the budget


def wait_for_memory(daemon: RunningDaemon, most_bytes: int) -> None:
    wait_until(lambda: backed_bytes(daemon) <= most_bytes, "memory went back to the driver")


def test_the_budget_of_a_gpu_is_lowered_and_raised_under_clients_that_work(
    many_layers: Case, tmp_path: Path
) -> None:
    # At the least: the layer that each of both needs next, and one more of the largest.
    room, least = many_layers.layers * CHUNK_BYTES, 3 * CHUNK_BYTES
    texts: list[list[int]] = []
    problems: list[BaseException] = []
    stop = threading.Event()

    def write(model: Any) -> None:
        try:
            while not stop.is_set():
                texts.append(many_layers.generate(model))
        except BaseException as problem:
            problems.append(problem)

    def more_texts(daemon: RunningDaemon) -> None:
        seen = len(texts)
        wait_until(lambda: problems or len(texts) >= seen + 2, "two more texts", 60)

    with daemon_of(many_layers, tmp_path, room, room) as daemon:
        models = [many_layers.load(daemon) for _ in range(2)]
        threads = [threading.Thread(target=write, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        try:
            for budget in (least, room, least + CHUNK_BYTES, room):
                more_texts(daemon)
                reply = daemon.ask("budget", tier=TIER, bytes=budget)
                assert reply["budget_bytes"] == budget
                wait_for_memory(daemon, budget)
                with Watched(daemon) as watched:
                    more_texts(daemon)
                assert watched.most_bytes <= budget
                assert gpu_of(daemon)["budget_bytes"] == budget
                assert gpu_of(daemon)["above_budget_bytes"] == 0
            assert backed_bytes(daemon) > least, "raised, it takes memory again"
        finally:
            stop.set()
            for thread in threads:
                thread.join(60)
            for model in models:
                model.tierd.close()
    assert problems == []
    assert len(texts) > 8
    assert all(text == many_layers.expected for text in texts)


def test_a_budget_too_small_for_those_who_are_there_is_refused_with_both_numbers(
    many_layers: Case, tmp_path: Path
) -> None:
    room = chunks_down(many_layers.nbytes)
    with daemon_of(many_layers, tmp_path, room, room) as daemon:
        model = many_layers.load(daemon)
        with model.tierd:
            for nbytes in (0, CHUNK_BYTES - 1, CHUNK_BYTES):
                with pytest.raises(Refused) as refused:
                    daemon.ask("budget", tier=TIER, bytes=nbytes)
                assert refused.value.code in ("budget_too_small", "bad_request")
                assert str(nbytes) in refused.value.text
            assert gpu_of(daemon)["budget_bytes"] == room
            assert many_layers.generate(model) == many_layers.expected


# ------------------------------------------------------------------------------- a daemon that dies


def generate_to_the_end(case: Case, model: Any) -> None:
    """What it leases it may read to the end, so it may take a while until it notices."""
    for _ in range(100):
        assert case.generate(model) == case.expected


def test_a_model_whose_daemon_died_lets_go_of_the_gpu_when_it_is_closed(
    many_layers: Case, tmp_path: Path
) -> None:
    room = many_layers.layers * CHUNK_BYTES
    own = (os.getpid(),)
    gc.collect()
    assert memfd_bytes(own, CHUNKS) == 0
    fds = Footprint.of(os.getpid()).fds
    with daemon_of(many_layers, tmp_path, room, room) as daemon:
        model = many_layers.load(daemon)
        assert many_layers.generate(model) == many_layers.expected
        assert memfd_bytes(own, CHUNKS) > 0
        daemon.kill()
        with pytest.raises(DaemonGone):
            generate_to_the_end(many_layers, model)
        model.tierd.close()
        assert memfd_bytes(own, CHUNKS) == 0, "it is nobody's, as long as somebody maps it"
        del model
        gc.collect()
        assert not Footprint.of(os.getpid()).fds - fds, "nor is a descriptor left"
    with daemon_of(many_layers, tmp_path, room, room) as daemon:  # and this process goes on
        model = many_layers.load(daemon)
        with model.tierd:
            assert many_layers.generate(model) == many_layers.expected
