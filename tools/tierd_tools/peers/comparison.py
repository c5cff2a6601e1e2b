"""One pruned model, one memory cap, every system in turn: rows in the form of the demo's.

The model is CAP_DIVISOR times the cap less the runtimes' grant. All systems get the same cap, the
same threads and prompt, and an empty page cache; what they then hold of it is charged to the cap.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from tierd_layouts import container
from tierd_layouts.names import layer_of
from tierd_tools import pack, random_model, unpack
from tierd_tools.checkpoint import CONFIG, SHARD_INDEX, read_config
from tierd_tools.demo import rows, ssd_counter
from tierd_tools.demo.model_processes import run_workers
from tierd_tools.demo.worker import prompt_ids
from tierd_tools.peers import gguf_llama

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path


MIB = 1 << 20
CAP_DIVISOR = 4
#: Of the cap less the runtimes, for what is no weight: the daemon itself, key-value cache, scratch.
#: With less, the code of the libraries would not stay in the page cache where the cap pays for it.
WORKING_BYTES = 32 * MIB
SPARSITY = 0.5
ACCELERATE = "Accelerate disk offload"
TRANSFORMERS = "transformers device_map disk"
LLAMA = "llama.cpp mmap"

#: Two steps of bf16 at a logit of 4 to 8: engines that round elsewhere may choose either token.
TIE_GAP = 2 * 2**-5
PROMPT_TOKENS = 32
NEW_TOKENS = 9

#: 2.0 GB in bf16: the decoder layers of TinyLlama-1.1B. Of the embedding only so much that it is as
#: small a part of the whole (3 %) as it is in the models that do not fit into memory.
SHAPE = random_model.Shape(
    hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4, vocabulary=16000
)

#: glibc keeps what is freed in pieces of up to 32 MiB; with Accelerate, which allocates a weight at
#: each use, that grew until the cap killed it. So weights get pages of their own and return them.
ACCELERATE_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(MIB)}

Reference = tuple[list[int], list[float]]
Systems = dict[str, "Callable[[], rows.Row]"]


@dataclass(frozen=True, slots=True)
class Files:
    """One model, in the form that each system reads."""

    pruned_dir: Path
    gguf: Path | None  #: None where llama.cpp is not installed
    packs: dict[str, Path]  #: by codec


def llama_missing() -> str | None:
    """Why llama.cpp cannot run here; None where it can."""
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed: pip install '.[peers]' (builds from source)"
    return None


def write_files(work_dir: Path, shape: random_model.Shape = SHAPE) -> Files:
    """The random model, pruned once; everything else is made from the pruned weights."""
    work_dir.mkdir(parents=True, exist_ok=True)
    model_dir, pruned_dir = work_dir / "dense", work_dir / "pruned"
    packs = {codec: work_dir / f"peers-{codec}" for codec in ("lossless", "raw")}
    random_model.write(model_dir, shape)
    pack.pack(model_dir, packs["lossless"], prune="magnitude", sparsity=SPARSITY)
    shutil.rmtree(model_dir)
    unpack.unpack(packs["lossless"], pruned_dir)
    shard_by_layer(pruned_dir)
    pack.pack(pruned_dir, packs["raw"], codec="raw")
    gguf = None if llama_missing() else work_dir / "pruned.gguf"
    if gguf is not None:
        gguf_llama.write_llama(pruned_dir, gguf)
    os.sync()
    return Files(pruned_dir, gguf, packs)


def shard_by_layer(model_dir: Path) -> None:
    """Cut the one file of a checkpoint into one a layer: Accelerate reads files whole at first, and
    no model that exceeds memory comes in one file."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    whole = model_dir / "model.safetensors"
    weight_map: dict[str, str] = {}
    with safe_open(str(whole), framework="pt") as source:
        layers: dict[str, list[str]] = {}
        for name in source.keys():  # noqa: SIM118  (no dict: it cannot be iterated)
            layers.setdefault(layer_of(name), []).append(name)
        for layer, names in layers.items():
            file = f"model-{layer}.safetensors"
            tensors = {name: source.get_tensor(name) for name in names}
            save_file(tensors, str(model_dir / file), metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"format": "pt"}, "weight_map": weight_map}
    (model_dir / SHARD_INDEX).write_text(json.dumps(index, indent=1))
    whole.unlink()


def setting(files: Files, codec: str, *, cap_enforced: bool) -> rows.Setting:
    """Of the systems that read the pack of `codec`, and of those that read no pack."""
    index = container.open_pack(files.packs[codec])
    return rows.Setting(
        pruned_dir=files.pruned_dir,
        pack_dir=files.packs[codec],
        work_dir=files.pruned_dir.parent,
        dense_bytes=index.dense_bytes,
        pack_bytes=index.pack_bytes,
        largest_layer_bytes=max(layer.nbytes for layer in index.layers),
        dram_budget_bytes=index.dense_bytes // CAP_DIVISOR - WORKING_BYTES,
        threads=len(os.sched_getaffinity(0)),
        prompt_tokens=PROMPT_TOKENS,
        new_tokens=NEW_TOKENS,
        cap_enforced=cap_enforced,
        cap_divisor=CAP_DIVISOR,
    )


def systems(files: Files, settings: Mapping[str, rows.Setting], reference: Reference) -> Systems:
    """What can be run, by name; the peers first. settings: by codec, all with one cap."""
    any_codec = settings["lossless"]
    table: Systems = {
        ACCELERATE: lambda: replace(
            rows.run_accelerate(any_codec, reference, ACCELERATE_ENVIRONMENT), name=ACCELERATE
        ),
        TRANSFORMERS: lambda: replace(
            rows.run_transformers(any_codec, reference), name=TRANSFORMERS
        ),
    }
    if files.gguf is not None:
        table[LLAMA] = partial(_run_llama, any_codec, files.gguf, reference)
    for codec, own in settings.items():
        for compute in ("fused", "dense"):
            table[tierd_name(codec, compute)] = partial(_run_tierd, own, codec, compute, reference)
    return table


def tierd_name(codec: str, compute: str) -> str:
    return f"tierd {codec} {compute}"


def _run_llama(setting: rows.Setting, gguf: Path, reference: Reference) -> rows.Row:
    """llama.cpp with the file mapped: the kernel's page cache is its DRAM tier."""
    ssd_counter.drop_from_page_cache(gguf.parent)
    vocabulary = read_config(setting.pruned_dir / CONFIG)["vocab_size"]
    prompt = prompt_ids(vocabulary, setting.prompt_tokens)[0].tolist()
    stat = ssd_counter.stat_file(setting.work_dir)
    argv = [sys.executable, "-m", "tierd_tools.peers.llama_worker", "--model", str(gguf)]
    argv += ["--threads", str(setting.threads), "--new-tokens", str(setting.new_tokens)]
    argv += ["--prompt", ",".join(map(str, prompt)), *(("--stat", str(stat)) if stat else ())]
    with rows.capped(setting, "llama", 1) as group:
        results = run_workers([group.command(argv)], setting.work_dir / "llama.log")
    return rows.summarise(setting, LLAMA, "dense", group, results, [reference])


def _run_tierd(setting: rows.Setting, codec: str, compute: str, reference: Reference) -> rows.Row:
    row = rows.run_tierd(setting, 1, compute, reference)
    return replace(row, name=tierd_name(codec, compute))


def middle(repeats: Sequence[rows.Row]) -> rows.Row:
    """Of several runs of one system, the one whose seconds per token are the median (of two in the
    middle, the slower)."""
    ordered = sorted(repeats, key=lambda row: row.seconds_per_token)
    return ordered[len(ordered) // 2]


def same_tokens(row: rows.Row) -> bool:
    """Whether the greedy tokens are the in-memory model's, up to the first near tie of its own."""
    if row.tokens_equal:
        return True
    return row.reference_gap is not None and row.reference_gap <= TIE_GAP
