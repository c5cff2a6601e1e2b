"""Checkpoints for the packer's tests, written and read by the safetensors library itself."""

from __future__ import annotations

import json
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

TORCH = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in TORCH.items()}

#: name -> (dtype, shape, bytes)
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def _to_torch(dtype: str, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=TORCH[dtype])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(TORCH[dtype]).reshape(shape)


class Checkpoints:
    """Writes and reads Hugging Face folders."""

    def write(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]],
        *,
        shards: int = 1,
        metadata: dict[str, str] | None = None,
    ) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text('{"model_type": "test"}\n')
        (folder / "tokenizer.json").write_text("{}\n")
        metadata = {"format": "pt"} if metadata is None else metadata
        names = sorted(tensors)
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        if shards == 1:
            files = ["model.safetensors"]
        for i, file in enumerate(files):
            content = {name: _to_torch(*tensors[name]) for name in names[i::shards]}
            save_file(content, str(folder / file), metadata)
        if shards > 1:
            weight_map = {name: files[names.index(name) % shards] for name in names}
            text = json.dumps({"metadata": {}, "weight_map": weight_map})
            (folder / "model.safetensors.index.json").write_text(text)
        return folder

    def read(self, folder: Path) -> Tensors:
        tensors: Tensors = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in list(file.keys()):  # it is no mapping
                    assert name not in tensors
                    tensor = file.get_tensor(name)
                    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                    tensors[name] = (NAMES[tensor.dtype], tuple(tensor.shape), data)
        return tensors

    def llama(self, *, layers: int = 3, size: int = 128, seed: int = 0) -> Tensors:
        """A small BF16 decoder with the names of a Llama, tied embeddings stored twice."""
        rng = np.random.default_rng(seed)

        def matrix(rows: int, cols: int) -> tuple[str, tuple[int, ...], bytes]:
            values = rng.normal(0, 0.02, (rows, cols)).astype(np.float32)
            return "BF16", (rows, cols), (values.view(np.uint32) >> 16).astype("<u2").tobytes()

        def ones() -> tuple[str, tuple[int, ...], bytes]:
            return "BF16", (size,), np.full(size, 0x3F80, "<u2").tobytes()

        embedding = matrix(96, size)
        tensors: Tensors = {
            "model.embed_tokens.weight": embedding,
            "lm_head.weight": embedding,
            "model.norm.weight": ones(),
        }
        for i in range(layers):
            layer = f"model.layers.{i}"
            tensors[f"{layer}.input_layernorm.weight"] = ones()
            for name in ("q_proj", "k_proj", "o_proj"):
                tensors[f"{layer}.self_attn.{name}.weight"] = matrix(size, size)
            tensors[f"{layer}.mlp.up_proj.weight"] = matrix(3 * size, size)
            tensors[f"{layer}.mlp.down_proj.weight"] = matrix(size, 3 * size)
        return tensors


@pytest.fixture(scope="session")
def checkpoints() -> Checkpoints:
    return Checkpoints()


class TinyModels:
    """Transformers models with random weights, written with a tokenizer of bytes."""

    VOCABULARY = 260

    def write(self, folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Any:
        """The model of a config, norms and biases random too; returned in evaluation mode."""
        from transformers import AutoModelForCausalLM

        config.dtype = dtype
        model = AutoModelForCausalLM.from_config(config)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.1, 0.2, generator=generator)
        model.save_pretrained(folder)
        self.write_tokenizer(folder)
        return model.eval()

    def write_tokenizer(self, folder: Path) -> None:
        """One token a byte, after three special ones."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({letter: i + 3 for i, letter in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')


@pytest.fixture(scope="session")
def tiny_models() -> TinyModels:
    return TinyModels()


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tierd-test", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command on this machine")
    if done.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def mounted_tmpfs() -> Any:
    """A function that mounts a tmpfs with options (`size=4m`) on a new folder, as a context."""
    return _mounted
