"""Models on leases against the same models in memory: equal bits with `dense`, through a daemon.

The reference is what a user gets without tierd: `unpack` of the pack, loaded by `from_pretrained`.
For a lossy codec that is a model with the quantised weights, rounded to its dtype.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
)

import tierd_kernels
from tierd_client import blocks, cores
from tierd_client.client import Client
from tierd_client.errors import DaemonNotRunning
from tierd_client.load import load_model, load_tokenizer
from tierd_client.scratch import Scratch
from tierd_layouts import quantised
from tierd_layouts.container import open_pack
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SEEDS = range(24)
#: Architectures, dtypes and settings have 4, 3 and 5 members, so 24 seeds mix them all.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRUNED: dict[str, Any] = {"prune": "magnitude", "sparsity": 0.5}
SETTINGS: tuple[dict[str, Any], ...] = (
    {"codec": "lossless", **PRUNED},
    {"codec": "raw", **PRUNED},
    {"codec": "int8", **PRUNED},
    {"codec": "lossless"},
    {"codec": "int4", "group": 64},
)
GRANULE_BYTES = 2 << 20
TRAINED = Path(__file__).resolve().parents[3] / "shared" / "models"
TRAINED_MODELS = ("stdlib-llama-12m", "stdlib-opt-12m")


@pytest.fixture(autouse=True, scope="module")
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_memory(folder: Path) -> Any:
    """The model with its weights where torch puts them: on 64 bytes.

    `from_pretrained` maps the file, where tensors lie on 8 bytes, and MKL's float32 product of one
    row sums in another order when a matrix is not on 16 bytes (bf16 and f16 products do not).
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


# ------------------------------------------------------------------------------------------- models


def llama(rng: random.Random, sizes: dict[str, Any], heads: int) -> Any:
    return LlamaConfig(
        **sizes,
        num_key_value_heads=rng.choice([1, heads]),
        attention_bias=rng.random() < 0.5,
        mlp_bias=rng.random() < 0.5,
    )


def qwen3(rng: random.Random, sizes: dict[str, Any], heads: int) -> Any:
    return Qwen3Config(
        **sizes,
        num_key_value_heads=rng.choice([1, heads]),
        head_dim=rng.choice([10, 24]),
        attention_bias=rng.random() < 0.5,
    )


def gpt_neox(rng: random.Random, sizes: dict[str, Any], heads: int) -> Any:
    return GPTNeoXConfig(
        **sizes,
        use_parallel_residual=rng.random() < 0.5,
        rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5},
        attention_bias=rng.random() < 0.5,
    )


def opt(rng: random.Random, sizes: dict[str, Any], heads: int) -> Any:
    sizes = dict(sizes)
    sizes["ffn_dim"] = sizes.pop("intermediate_size")
    return OPTConfig(
        **sizes,
        word_embed_proj_dim=rng.choice([sizes["hidden_size"], 52]),
        do_layer_norm_before=rng.random() < 0.5,
        enable_bias=rng.random() < 0.7,
        max_position_embeddings=96,
    )


KINDS: dict[str, Callable[..., Any]]
KINDS = {"llama": llama, "qwen3": qwen3, "gpt_neox": gpt_neox, "opt": opt}


def build_model(seed: int, folder: Path) -> str:
    """A random checkpoint of the seed's architecture, sizes, ties, biases and dtype."""
    rng = random.Random(seed)
    kind = list(KINDS)[seed % len(KINDS)]
    heads = rng.choice([2, 3, 5])
    sizes = {
        "hidden_size": heads * rng.choice([12, 20, 44]),
        "intermediate_size": rng.randrange(65, 300),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "vocab_size": rng.randrange(70, 300),
        "tie_word_embeddings": rng.random() < 0.5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    config = KINDS[kind](rng, sizes, heads)
    config.dtype = DTYPES[seed % len(DTYPES)]
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: at birth they are 0 and 1
            parameter.normal_(0.1, 0.2, generator=generator)
    name = f"{kind}-{seed}"
    model.save_pretrained(folder / name)
    return name


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


@contextmanager
def daemon_of(packs: Path, dram: str) -> Iterator[str]:
    """A daemon that serves every pack in a folder; its socket."""
    socket = str(packs.parent / "tierd.sock")
    command = [sys.executable, "-m", "tierd", "--models", str(packs), "--dram", dram]
    command += ["--socket", socket, "--log-level", "warning"]
    process = subprocess.Popen(command)
    try:
        wait_for_daemon(socket, process)
        yield socket
    finally:
        process.terminate()
        assert process.wait(20) == 0


def wait_for_daemon(socket: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            Client(socket).close()
        except DaemonNotRunning:
            assert process.poll() is None, "the daemon ended before it served"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            return


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


def capture(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of every linear, [tokens, features], with the outliers of trained models."""
    inputs: dict[str, torch.Tensor] = {}

    def note(module: nn.Module, args: Any) -> None:
        inputs[names[module]] = args[0].reshape(-1, args[0].shape[-1])

    names: dict[nn.Module, str]
    names = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    handles = [module.register_forward_pre_hook(note) for module in names]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return inputs


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def check_products(socket: str, name: str, inputs: dict[str, torch.Tensor]) -> int:
    """Every packed matrix times the input of its linear, within the promised bounds."""
    checked = 0
    with Client(socket) as client:
        opened = client.open(name)
        for number, layer in enumerate(opened.index.layers):
            with opened.acquire(number) as lease:
                for tensor in layer.tensors:
                    module = tensor.name.removesuffix(".weight")
                    if tensor.codec == "dense" or module not in inputs:
                        continue
                    x = inputs[module]
                    weight = lease[tensor.name].dense()
                    exact = x.double() @ weight.double().T
                    theirs = relative_error(nn.functional.linear(x, weight), exact)
                    blocked = lease[tensor.name].blocked(x, None, Scratch())
                    assert relative_error(blocked, exact) <= 1.05 * theirs, tensor.name
                    if tensor.codec in ("int8", "int4"):  # not rounded to the dtype when fused
                        matrix = opened.matrices.packed(layer, tensor, lease.offset)
                        exact = x.double() @ torch.from_numpy(quantised.weights(matrix)).double().T
                        theirs = relative_error(exact.to(x.dtype), exact)
                    single = lease[tensor.name].linear_f32(x)
                    assert relative_error(single, exact) < 1e-5, tensor.name
                    if x.dtype != torch.float32:
                        ours = relative_error(lease[tensor.name].linear(x), exact)
                        assert ours <= 1.05 * theirs, tensor.name
                    checked += 1
    return checked


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


# ---------------------------------------------------------------------------------- trained models


def trained(name: str) -> Path:
    folder = TRAINED / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"trained model {name} is not in ../shared/models")
    return folder


@dataclass(frozen=True)
class Trained:
    name: str
    reference: Any
    socket: str
    text: str


@pytest.fixture(scope="module", params=TRAINED_MODELS)
def trained_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    """Served with hardly more than one layer's memory: layers are read again and again."""
    source = trained(request.param)
    folder = tmp_path_factory.mktemp("trained")
    pack(source, folder / "packs" / source.name, prune="magnitude", sparsity=0.5)
    unpack(folder / "packs" / source.name, folder / "reference")
    reference = in_memory(folder / "reference")
    text = (TRAINED / "dev.txt").read_text()[:4000]
    largest = max(layer.nbytes for layer in open_pack(folder / "packs" / source.name).layers)
    granules = -(-largest // GRANULE_BYTES) + 1  # a layer may start inside one
    with daemon_of(folder / "packs", str(granules * GRANULE_BYTES)) as socket:
        yield Trained(source.name, reference, socket, text)


def tokens_of(trained_model: Trained, count: int) -> torch.Tensor:
    tokenizer = load_tokenizer(trained_model.name, socket=trained_model.socket)
    ids: torch.Tensor = tokenizer(trained_model.text, return_tensors="pt")["input_ids"]
    return ids[:, :count]


def test_a_trained_model_writes_the_same_text_from_one_layers_memory(
    trained_model: Trained,
) -> None:
    ids = tokens_of(trained_model, 48)
    model: Any = load_model(trained_model.name, compute="dense", socket=trained_model.socket)
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    settings |= {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    with model.tierd, torch.no_grad():
        expected = trained_model.reference.generate(ids, **settings)
        got = model.generate(ids, **settings)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))
    with Client(trained_model.socket) as client:
        status = client.ask("status")
    assert status["scheduler"]["evictions"] > 0, "the budget held everything: nothing was shown"
    assert status["dram"]["peak_bytes"] <= status["dram"]["budget_bytes"]


def test_threads_of_a_trained_model_share_what_its_client_was_granted(
    trained_model: Trained,
) -> None:
    # Out of step they want more layers than the daemon reserved: it refuses, and one waits.
    ids = tokens_of(trained_model, 60)
    model: Any = load_model(trained_model.name, compute="dense", socket=trained_model.socket)
    parts = [ids[:, :7], ids[:, 7:20], ids[:, 20:60]]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    got: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        mask = torch.ones_like(parts[number])
        got[number] = model.generate(parts[number], attention_mask=mask, **settings)

    with model.tierd:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
    for number, part in enumerate(parts):
        mask = torch.ones_like(part)
        expected = trained_model.reference.generate(part, attention_mask=mask, **settings)
        assert torch.equal(got[number], expected)


def test_fused_products_of_real_activations_stay_in_their_bounds(trained_model: Trained) -> None:
    inputs = capture(trained_model.reference, tokens_of(trained_model, 24))
    checked = check_products(trained_model.socket, trained_model.name, inputs)
    assert checked >= 24
    largest = max(float(x.abs().max() / x.float().square().mean().sqrt()) for x in inputs.values())
    assert largest > 15, "no outliers among these activations"
