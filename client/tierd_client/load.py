"""A transformers model that runs on leases: made from the pack's config, weights left in the arena.

`load_model` builds the model with transformers' own loader from placeholders (see `names`), then
gives every weight its place (see `placement`).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tierd_client import progress_bars
from tierd_client.attendant import Attendant
from tierd_client.compute import Arithmetic, Compute
from tierd_client.device import check_device, choose_tier
from tierd_client.device_leasing import DeviceLeases
from tierd_client.eager import eager
from tierd_client.errors import UnsupportedModel
from tierd_client.graphs import Graphs
from tierd_client.names import check_loaded, map_checkpoint, placeholders, stored_tensors
from tierd_client.placement import Placement
from tierd_client.served import Served, serve
from tierd_client.source import Source, control_directory, open_source, pack_directory

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tierd_client.modules import Copied
    from tierd_client.names import Stored
    from tierd_client.opened import OpenedModel


def load_model(
    name_or_pack: str | os.PathLike[str],
    compute: str | None = None,
    socket: str | None = None,
    *,
    device: str = "cpu",
    tier: str | None = None,
    tokens_per_pass: int = 1,
    graphs: bool = False,
) -> PreTrainedModel:
    """The model served as `name_or_pack`, or the pack in that directory, in evaluation mode.

    device: "cpu", "cuda" or "cuda:N": where it computes. tier: from what, "dram" or "gpu:N"; the
    default is "dram" for the CPU and the tier of that number for a GPU. The CPU reads a tier
    "gpu:N" only when the daemon plays that GPU (--gpu-device memfd).
    compute: "fused" is the default. "dense" gives the bits of the in-memory model (under
    torch.no_grad, as `generate` runs it); "fused" multiplies a few tokens straight from the packed
    form, in float32 with one rounding, and more of them with blocks of it that stay in cache, or on
    a GPU as "dense". The in-memory model of a pack in a lossy codec (int8, int4) is that of
    `tierctl unpack`, with the quantised weights rounded to its dtype; "fused" multiplies a few
    tokens with the unrounded ones.
    graphs: on a GPU, decoding with a static cache (`generate(cache_implementation="static")`) is
    captured as a CUDA graph and repeated, while all layers are resident and nobody else needs their
    memory; decoding with another cache is refused.
    socket: see `Client`. tokens_per_pass: how many tokens a forward pass mostly serves (a batch, or
    what a speculative pass verifies), for the daemon's figures per token. The model has
    `model.tierd`, with `.statistics()` and `.close()`. Norms and biases stay on the meta device
    until their layer is first used.
    Raises UnsupportedModel with the list of what stands in the way, ModelNotFound, PackInvalid,
    BudgetTooSmall, DaemonGone, PrivateDaemonFailed, TierUnavailable, UnsupportedDevice for what
    does not go together, DeviceFailed; ValueError for another `compute`.
    """
    if tokens_per_pass < 1:
        raise ValueError(f"tokens_per_pass is {tokens_per_pass}, expected 1 or more")
    mode = Compute.chosen(compute, torch.device(check_device(device)))
    source = open_source(name_or_pack, socket, choose_tier(device, tier), device)
    try:
        return _load(source, mode, tokens_per_pass, graphs)
    except BaseException:
        source.close()
        raise


def load_tokenizer(
    name_or_pack: str | os.PathLike[str], socket: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model. A pack directory is read without a daemon.

    Raises UnsupportedModel for one that transformers cannot load, and what `load_model` raises of
    a model that is not there.
    """
    pack = pack_directory(name_or_pack)
    if pack is not None:
        return _tokenizer(pack, pack.name)
    source = open_source(name_or_pack, socket)
    try:
        with control_directory(source.opened.files) as directory:
            tokenizer = _tokenizer(directory, source.opened.name)
    finally:
        source.close()
    tokenizer.name_or_path = source.opened.name
    return tokenizer


def _tokenizer(directory: Path, name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with _read_by_transformers(f"{name}: its tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


@contextmanager
def _read_by_transformers(refusal: str) -> Iterator[None]:
    """What it raises for files that it cannot use becomes UnsupportedModel."""
    try:
        yield
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        raise UnsupportedModel(f"{refusal}: {error}") from error


def _load(source: Source, compute: Compute, tokens_per_pass: int, graphs: bool) -> Any:
    opened = source.opened
    with control_directory(opened.files) as directory:
        model, mapping = _empty_model(opened, directory)
    device = opened.mapping.device
    placement = Placement(model, mapping, device)
    leases = DeviceLeases(opened, placement.order, tokens_per_pass=tokens_per_pass)
    arithmetic = Arithmetic(leases, compute, device)
    captured = Graphs(leases, arithmetic) if graphs else None
    sites = placement.install(leases, arithmetic)
    copied_bytes = _copy_now(opened, placement.copied_now)
    attendant = Attendant(leases, lambda: arithmetic.scratch_bytes, captured)
    served = Served(leases, attendant, arithmetic, sites, copied_bytes, source.close, captured)
    _mark_passes(model, leases, arithmetic)
    serve(model, served)
    return model


def _mark_passes(model: Any, leases: DeviceLeases, arithmetic: Arithmetic) -> None:
    @eager
    def begin(module: Any, args: Any) -> None:
        leases.begin_pass()
        arithmetic.begin_pass()

    @eager
    def end(module: Any, args: Any, output: Any) -> None:
        leases.end_pass()

    model.register_forward_pre_hook(begin)
    model.register_forward_hook(end)


def _empty_model(opened: OpenedModel, directory: Path) -> tuple[Any, dict[str, Stored]]:
    """The model with placeholders for weights, and which stored tensor each name means."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    if "config.json" not in opened.files:
        raise UnsupportedModel(
            f"{opened.name} has no config.json, so nothing says what model it is"
        )
    stored = stored_tensors(opened.index)
    made = placeholders(stored)
    with _read_by_transformers(f"{opened.name}: no causal LM of transformers"):
        # Code from a model folder is never run, and never asked about at the terminal.
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        if getattr(config, "quantization_config", None) is not None:
            raise UnsupportedModel(f"{opened.name} is a quantised checkpoint")
        if config.dtype is None:
            config.dtype = next(t.dtype for t in made.values() if t.is_floating_point())
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    mapping = map_checkpoint(skeleton, stored)
    generation = None
    if "generation_config.json" in opened.files:
        with _read_by_transformers(f"{opened.name}: generation_config.json cannot be used"):
            generation = GenerationConfig.from_pretrained(directory)
    with progress_bars.left_out():
        model, info = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict=made,
            dtype=config.dtype,
            generation_config=generation,
            output_loading_info=True,
        )
    check_loaded(model, info, mapping, made)
    model.requires_grad_(False)
    model.name_or_path = model.config.name_or_path = opened.name
    return model, mapping


def _copy_now(opened: OpenedModel, copied: list[Copied]) -> int:
    """Fill in what lies in layers that no site leases, one lease a layer; returns the bytes."""
    nbytes = 0
    for layer in sorted({item.stored.layer for item in copied}):
        with opened.acquire(layer) as lease:
            nbytes += sum(item.copy(lease) for item in copied if item.stored.layer == layer)
    return nbytes
