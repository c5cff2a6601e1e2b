"""Models on leases against the same models in memory: equal bits with `dense`, through a daemon.

The reference is what a user gets without tierd: `unpack` of the pack, loaded by `from_pretrained`.
For a lossy codec that is a model with the quantised weights, rounded to its dtype.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch

import tierd_kernels
from tests.e2e.both_sides import daemon_of, in_memory
from tests.e2e.product_bounds import capture, check_products
from tests.e2e.random_checkpoints import build_model
from tierd_client import blocks, cores
from tierd_client.load import load_model
from tierd_layouts.container import open_pack
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Architectures, dtypes and settings have 4, 3 and 5 members, so 24 seeds mix them all.
SEEDS = range(24)
PRUNED: dict[str, Any] = {"prune": "magnitude", "sparsity": 0.5}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"codec": "lossless", **PRUNED},
    {"codec": "raw", **PRUNED},
    {"codec": "int8", **PRUNED},
    {"codec": "lossless"},
    {"codec": "int4", "group": 64},
)

pytestmark = pytest.mark.usefixtures("two_threads")


# ------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Zoo:
    """Packs by name, the unpacked (pruned) checkpoints beside them, and who serves the packs."""

    packs: Path
    references: Path
    socket: str

    def reference(self, name: str) -> Any:
        return in_memory(self.references / name)

    @contextmanager
    def served(self, name: str, compute: str) -> Iterator[Any]:
        model: Any = load_model(name, compute=compute, socket=self.socket)
        with model.tierd:
            yield model


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zoo]:
    folder = tmp_path_factory.mktemp("zoo")
    for seed in SEEDS:
        name = build_model(seed, folder / "source")
        settings = SETTINGS[seed % len(SETTINGS)]
        pack(folder / "source" / name, folder / "packs" / name, **settings)
        unpack(folder / "packs" / name, folder / "references" / name)
    with daemon_of(folder / "packs", "64MiB") as socket:
        yield Zoo(folder / "packs", folder / "references", socket)


def prompt(model: Any, seed: int, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """A batch with padding on the left, as generation needs it."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 2), "attention_mask": mask}


def sampled(model: Any, seed: int, rows: int = 2) -> Any:
    torch.manual_seed(seed)
    return model.generate(
        **prompt(model, seed, rows, 9),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=True,
        top_k=20,
        output_logits=True,
        return_dict_in_generate=True,
    )


def name_of(zoo: Zoo, seed: int) -> str:
    (found,) = [path.name for path in zoo.packs.iterdir() if path.name.endswith(f"-{seed}")]
    return found


def packed_tensors(zoo: Zoo, name: str) -> int:
    """Unpruned F16 hardly compresses without loss: of such a model it can be none."""
    layers = open_pack(zoo.packs / name).layers
    return sum(tensor.codec != "dense" for layer in layers for tensor in layer.tensors)


# -------------------------------------------------------------------------------------------- dense


@pytest.mark.parametrize("seed", SEEDS)
def test_dense_gives_the_bits_of_the_model_in_memory(zoo: Zoo, seed: int) -> None:
    name = name_of(zoo, seed)
    reference = zoo.reference(name)
    with zoo.served(name, "dense") as model, torch.no_grad():
        for rows, tokens in ((1, 1), (2, 5), (3, 40)):
            batch = prompt(reference, seed, rows, tokens)
            expected, got = reference(**batch).logits, model(**batch).logits
            assert expected.std() > 0.01, "the reference says nothing"
            assert torch.equal(got, expected), f"{name}, batch of {rows} x {tokens}"
        expected, got = sampled(reference, seed), sampled(model, seed)
        assert torch.equal(got.sequences, expected.sequences)
        for step, (mine, theirs) in enumerate(zip(got.logits, expected.logits, strict=True)):
            assert torch.equal(mine, theirs), f"{name}, step {step}"


@pytest.mark.parametrize("seed", range(4))
def test_buffers_and_settings_are_those_of_the_model_in_memory(zoo: Zoo, seed: int) -> None:
    name = name_of(zoo, seed)
    reference = zoo.reference(name)
    with zoo.served(name, "dense") as model:
        expected, got = dict(reference.named_buffers()), dict(model.named_buffers())
        assert expected.keys() == got.keys()
        for key, buffer in expected.items():
            assert torch.equal(buffer, got[key]), key
            assert buffer.dtype == got[key].dtype, key
        assert model.generation_config.to_dict() == reference.generation_config.to_dict()
        assert model.dtype == reference.dtype
        assert model.device == reference.device
        assert model.num_parameters() == reference.num_parameters()
        shapes = {key: (p.shape, p.dtype) for key, p in reference.named_parameters()}
        assert {key: (p.shape, p.dtype) for key, p in model.named_parameters()} == shapes


PROCESSES = textwrap.dedent(
    """
    import hashlib, json, os, sys
    import torch, transformers
    from tierd_client.load import load_model, load_tokenizer
    from transformers import AutoModelForCausalLM
    socket, jobs = sys.argv[1], sys.argv[2:]
    torch.set_num_threads(1)
    pipes, children = [], []
    for _ in range(3):  # before torch has started any thread
        readable, writable = os.pipe()
        child = os.fork()
        if child == 0:
            ids = torch.arange(3, 43).view(2, 20)
            digests = {}
            for job in jobs:
                compute, name = job.split(":")
                model = load_model(name, compute=compute, socket=socket)
                with model.tierd, torch.no_grad():
                    for _ in range(2):
                        digest = hashlib.sha256()
                        for batch in (ids, ids[:, :5]):
                            digest.update(model(batch).logits.float().numpy().tobytes())
                digests[job] = digest.hexdigest()
            os.write(writable, json.dumps(digests).encode())
            os._exit(0)
        os.close(writable)
        pipes.append(readable)
        children.append(child)
    for readable, child in zip(pipes, children):
        print(os.read(readable, 65536).decode(), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
)


@contextmanager
def alone(zoo: Zoo, name: str, compute: str) -> Iterator[Any]:
    """What one process computes: for `dense` the model in memory, else the served one."""
    if compute == "dense":
        yield zoo.reference(name)
    else:
        with zoo.served(name, compute) as model:
            yield model


def test_three_processes_at_once_get_the_same_bits(zoo: Zoo) -> None:
    jobs = [f"dense:{name_of(zoo, seed)}" for seed in (4, 5)]
    jobs += [f"fused:{name_of(zoo, seed)}" for seed in (9, 10)]
    command = [sys.executable, "-c", PROCESSES, zoo.socket, *jobs]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert process.returncode == 0, process.stderr
    expected = {}
    torch.set_num_threads(1)
    ids = torch.arange(3, 43).view(2, 20)
    for job in jobs:
        compute, name = job.split(":")
        digest = hashlib.sha256()
        with torch.no_grad(), alone(zoo, name, compute) as model:
            for batch in (ids, ids[:, :5]):
                digest.update(model(batch).logits.float().numpy().tobytes())
        expected[job] = digest.hexdigest()
    torch.set_num_threads(2)
    found = []
    for line in process.stdout.splitlines():
        digests, _, status = line.rpartition(" ")
        assert status == "0", process.stderr
        found.append(json.loads(digests))
    assert found == [expected] * 3  # all at once: who differs from whom is shown


def test_the_zoo_has_every_codec_in_every_form_and_dtype(zoo: Zoo) -> None:
    forms: dict[str, set[str]] = {}
    for path in zoo.packs.iterdir():
        for layer in open_pack(path).layers:
            for tensor in layer.tensors:
                form = "masked" if "bitmap" in tensor.arrays else "dense"
                forms.setdefault(f"{tensor.codec} {form}", set()).add(tensor.dtype)
    wanted = (
        "dense dense",
        "raw masked",
        "exponent-packed masked",
        "exponent-packed dense",
        "int8 masked",
        "int4 dense",
    )
    every = {"BF16", "F16", "F32"}
    assert {form: forms.get(form) for form in wanted} == dict.fromkeys(wanted, every)


def test_threads_of_one_process_do_not_disturb_each_other(zoo: Zoo) -> None:
    name = name_of(zoo, 4)
    reference = zoo.reference(name)
    batches = [prompt(reference, seed, 2, 5 + seed) for seed in range(4)]
    with torch.no_grad():
        expected = [reference(**batch).logits for batch in batches]
    problems: list[str] = []

    def run(model: Any, number: int) -> None:
        with torch.no_grad():
            results = [model(**batches[number]).logits for _ in range(12)]
        if not all(torch.equal(logits, expected[number]) for logits in results):
            problems.append(f"thread {number} got other logits")

    with zoo.served(name, "dense") as model:
        threads = [threading.Thread(target=run, args=(model, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
    assert problems == []


# -------------------------------------------------------------------------------------------- fused


@pytest.mark.parametrize("seed", SEEDS)
def test_fused_products_stay_in_their_bounds(zoo: Zoo, seed: int) -> None:
    name = name_of(zoo, seed)
    reference = zoo.reference(name)
    inputs = capture(reference, prompt(reference, seed, 1, 20)["input_ids"])
    assert check_products(zoo.socket, name, inputs) == packed_tensors(zoo, name)


#: Of the logits, relative to their spread, after all layers.
LOGITS_ERROR = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}


@pytest.mark.parametrize("seed", SEEDS)
def test_fused_prefill_and_decode_are_close(
    zoo: Zoo, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1)  # 64 rows for each thread, so that there are many
    name = name_of(zoo, seed)
    reference = zoo.reference(name)

    def check(batch: dict[str, torch.Tensor]) -> None:
        got, expected = model(**batch).logits.double(), reference(**batch).logits.double()
        shown = batch["attention_mask"].bool()
        error = (got - expected)[shown].square().mean().sqrt() / expected[shown].std()
        assert error < LOGITS_ERROR[reference.dtype], f"{error:.2e}"

    with zoo.served(name, "fused") as model, torch.no_grad():
        check(prompt(reference, seed, 3, 40))
        statistics = model.tierd.statistics()
        assert statistics.blocked_calls == packed_tensors(zoo, name)
        assert statistics.fused_calls == statistics.expansions == 0
        check(prompt(reference, seed, 2, 5))
        assert model.tierd.statistics().fused_calls == packed_tensors(zoo, name)
        assert sampled(model, seed).sequences.shape == (2, 15)


HOLDER = textwrap.dedent(
    """
    import sys
    from tierd_client.client import Client
    with Client(sys.argv[1]) as client:
        opened = client.open(sys.argv[2])
        leases = [opened.acquire(0), opened.acquire(1)]
        print("holding", flush=True)
        sys.stdin.read()
        for lease in leases:
            lease.release()
    """
)


@contextmanager
def holder(zoo: Zoo, name: str) -> Iterator[None]:
    """Another process that works with leases."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, zoo.socket, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holding\n"
        yield
        process.communicate()
    assert process.returncode == 0


def test_kernels_leave_other_processes_their_share_of_the_processors(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    linear = tierd_kernels.linear

    def note(*arguments: Any, threads: int) -> None:
        used.append(threads)
        linear(*arguments, threads=threads)

    monkeypatch.setattr(tierd_kernels, "linear", note)
    monkeypatch.setattr(cores, "processors", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    name, others = name_of(zoo, 0), name_of(zoo, 5)
    logits = []

    def threads() -> set[int]:
        used.clear()
        with torch.no_grad():
            logits.append(model(torch.arange(3, 8)[None]).logits)
        return set(used)

    with zoo.served(name, "fused") as model:
        assert threads() == {4}
        with holder(zoo, others):
            assert threads() == {2}
            with holder(zoo, others):
                assert threads() == {2}, "two processors for each of three, rather than one"
        assert threads() == {4}
    assert all(torch.equal(each, logits[0]) for each in logits)
