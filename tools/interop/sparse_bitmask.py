"""Exchanges bitmask checkpoints with compressed-tensors itself, in environments of its own.

The last release that knows the formats wants transformers below 5 and so cannot be installed beside
tierd. In one environment for each dialect, from the top of the repository:

    python -m venv b && b/bin/pip install torch==2.13.0 psutil compressed-tensors==0.14.0.1
    python -m venv a && a/bin/pip install torch==2.13.0 'transformers<5' compressed-tensors==0.8.1

The files in tests/tools/data (the README there has the versions):

    a/bin/python tools/interop/sparse_bitmask.py make tests/tools/data
    b/bin/python tools/interop/sparse_bitmask.py make tests/tools/data

Whether the library reads what `tierctl unpack --format sparse-bitmask` wrote, and gets the weights
of the same pack unpacked without it (-0.0, which the format cannot hold, being 0.0):

    b/bin/python tools/interop/sparse_bitmask.py check EXPORTED UNPACKED

The last line says how many tensors were equal; the exit code is 1 if one is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import compressed_tensors  # type: ignore[import-not-found]
import torch
from compressed_tensors import BitmaskConfig, ModelCompressor
from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import (  # type: ignore[import-not-found]
    BitmaskCompressor,
)
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

SHARED = "model.safetensors.index.json"


def make(folder: Path) -> None:
    """Writes the fixtures that the installed release can write."""
    model = small_model()
    state = dict(model.state_dict())
    _save_dense(state, folder / "dense")
    if hasattr(BitmaskCompressor, "COMPRESSION_PARAM_NAMES"):  # a release before 0.9
        compressor = ModelCompressor(sparsity_config=BitmaskConfig(global_sparsity=0.6))
        _save(compressor, model, compressor.compress(model, state), folder / "bitmask-a")
        return
    config = BitmaskConfig(global_sparsity=0.6, targets=["Linear"], ignore=["lm_head"])
    compressor = ModelCompressor(sparsity_config=config)
    _save(compressor, model, compressor.compress(model, state), folder / "bitmask-b")
    _cut_into_shards(folder / "bitmask-b")

    from compressed_tensors import Sparse24BitMaskConfig

    model = small_model(two_of_four=True)
    state = dict(model.state_dict())
    _save_dense(state, folder / "dense-24")
    compressor = ModelCompressor(
        sparsity_config=Sparse24BitMaskConfig(
            global_sparsity=0.5, targets=["Linear"], ignore=["lm_head"]
        )
    )
    _save(compressor, model, compressor.compress(model, state), folder / "bitmask-24")

    # Without targets the writer compresses nothing, and says in config.json that it did.
    compressor = ModelCompressor(sparsity_config=BitmaskConfig(global_sparsity=0.6))
    _save(compressor, model, compressor.compress(model, state), folder / "bitmask-untrue")


def small_model(*, two_of_four: bool = False) -> Any:
    """A Llama of one layer in BF16: odd widths, an empty row, an all-zero weight, NaN, -0.0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24 if two_of_four else 27,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=10,
        max_position_embeddings=8,
        attention_bias=True,
        torch_dtype="bfloat16",
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.copy_(torch.randn(weight.shape))
                weight[torch.rand(weight.shape) < 0.2] = 0.0
            elif two_of_four and ".layers." in name:
                groups = weight.view(-1, 4)
                groups.scatter_(1, groups.abs().topk(2, 1, largest=False).indices, 0.0)
            else:
                weight[torch.rand(weight.shape) < 0.6] = 0.0
        attention = model.model.layers[0].self_attn
        attention.q_proj.weight[3] = 0.0
        attention.k_proj.weight.zero_()
        if not two_of_four:
            attention.v_proj.weight[2, 5] = float("nan")
            attention.v_proj.weight[2, 6] = float("-inf")
            attention.v_proj.weight[4, 1] = -0.0
    return model


def check(exported: Path, unpacked: Path) -> bool:
    """Prints every difference; whether there was none."""
    dense: dict[str, torch.Tensor] = {}
    for file in sorted(unpacked.glob("*.safetensors")):
        dense |= load_file(file)
    config = json.loads((exported / "config.json").read_text())
    section = ModelCompressor.from_compression_config(config["quantization_config"])
    print(f"the library reads its section of config.json: {section.sparsity_config}")
    equal = 0
    for name, found in section.sparsity_compressor.decompress(str(exported)):
        expected = dense.pop(name, None)
        if expected is None or expected.dtype != found.dtype or expected.shape != found.shape:
            print(f"{name}: found {found.dtype} {tuple(found.shape)}, expected {expected}")
        elif not torch.equal(_bits(found), _bits(expected)):
            print(f"{name}: {int((_bits(found) != _bits(expected)).sum())} elements differ")
        else:
            equal += 1
            continue
        return False
    for name in dense:
        print(f"{name} is missing")
    print(f"{equal} tensors are equal, {len(dense)} missing")
    return not dense


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, -0.0 as 0.0; NaN compares by its bits."""
    without_sign = torch.where(tensor == 0, torch.zeros_like(tensor), tensor)
    return without_sign.contiguous().reshape(-1).view(torch.uint8)


def _save_dense(state: dict[str, torch.Tensor], folder: Path) -> None:
    """The weights before the library had them, as a safetensors file alone."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def _save(compressor: Any, model: Any, state: dict[str, torch.Tensor], folder: Path) -> None:
    model.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    compressor.update_config(str(folder))
    print(f"{folder}: {len(state)} tensors, compressed-tensors {compressed_tensors.__version__}")


def _cut_into_shards(folder: Path) -> None:
    """Two files; the parts of a weight are in both."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    names = sorted(state)
    for i, file in enumerate(files):
        save_file({name: state[name] for name in names[i::2]}, folder / file, {"format": "pt"})
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    text = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=1)
    (folder / SHARED).write_text(text + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("folder", type=Path)
    check_parser = commands.add_parser("check")
    check_parser.add_argument("exported", type=Path)
    check_parser.add_argument("unpacked", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.folder)
        return 0
    return 0 if check(arguments.exported, arguments.unpacked) else 1


if __name__ == "__main__":
    sys.exit(main())
