"""The GGUF that llama.cpp gets: its bytes, its order of rows, and what llama.cpp computes of it."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tierd_tools import random_model
from tierd_tools.errors import CheckpointError
from tierd_tools.peers import gguf, gguf_llama

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class Reader:
    """Reads a GGUF as its specification says, independently of the writer's arithmetic."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0
        assert self._take(4) == b"GGUF"
        version, tensors, pairs = self._unpack("<IQQ")
        assert version == 3
        self.metadata = {self._string(): self._value() for _ in range(pairs)}
        infos = [self._info() for _ in range(tensors)]
        begin = -(-self._at // 32) * 32
        self.tensors = {
            name: (type_, shape, data[begin + offset :]) for name, type_, shape, offset in infos
        }
        self.offsets = [offset for *_, offset in infos]

    def bits(self, name: str) -> NDArray[Any]:
        type_, shape, data = self.tensors[name]
        form = {0: "<f4", 30: "<u2"}[type_]
        return np.frombuffer(data, form, count=int(np.prod(shape))).reshape(shape)

    def _take(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def _unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._take(struct.calcsize(form)))

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        return self._take(length).decode()

    def _value(self) -> object:
        (kind,) = self._unpack("<I")
        return self._string() if kind == 8 else self._unpack({4: "<I", 6: "<f"}[kind])[0]

    def _info(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        (count,) = self._unpack("<I")
        dimensions = self._unpack(f"<{count}Q")
        type_, offset = self._unpack("<IQ")
        return name, type_, dimensions[::-1], offset


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers") / "model"
    random_model.write(folder, random_model.TINY)
    return folder


@pytest.fixture(scope="module")
def file(model_dir: Path) -> Path:
    path = model_dir.parent / "model.gguf"
    gguf_llama.write_llama(model_dir, path)
    return path


def checkpoint_bits(model_dir: Path, layer: str, name: str) -> NDArray[Any]:
    from safetensors.torch import load_file

    tensor = load_file(str(model_dir / f"model-{layer}.safetensors"))[name]
    bits: NDArray[Any] = tensor.view(torch.uint16).numpy()
    return bits


def test_every_weight_keeps_its_bits_and_every_offset_is_aligned(
    model_dir: Path, file: Path
) -> None:
    reader = Reader(file.read_bytes())
    assert all(offset % 32 == 0 for offset in reader.offsets)
    assert len(reader.tensors) == 2 + 2 * 9
    for ours, module in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        theirs = checkpoint_bits(model_dir, "layer-001", f"model.layers.1.{module}.weight")
        np.testing.assert_array_equal(reader.bits(f"blk.1.{ours}.weight"), theirs)
    embedding = checkpoint_bits(model_dir, "embedding", "model.embed_tokens.weight")
    np.testing.assert_array_equal(reader.bits("token_embd.weight"), embedding)
    np.testing.assert_array_equal(reader.bits("output_norm.weight"), np.ones(256, "<f4"))


def test_a_pair_that_is_rotated_together_lies_in_neighbouring_rows(
    model_dir: Path, file: Path
) -> None:
    """transformers rotates row i of a head with row i + half; llama.cpp row 2i with row 2i + 1."""
    theirs = checkpoint_bits(model_dir, "layer-000", "model.layers.0.self_attn.q_proj.weight")
    ours = Reader(file.read_bytes()).bits("blk.0.attn_q.weight")
    size = 256 // 4
    for head in range(4):
        for pair in range(size // 2):
            for side in range(2):
                np.testing.assert_array_equal(
                    ours[head * size + 2 * pair + side],
                    theirs[head * size + side * size // 2 + pair],
                )


def test_the_file_describes_the_model(file: Path) -> None:
    metadata = Reader(file.read_bytes()).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.attention.head_count_kv"] == 4
    assert metadata["llama.block_count"] == 2
    assert metadata["llama.vocab_size"] == 1000
    assert metadata["llama.rope.freq_base"] == 10000.0


@pytest.mark.parametrize(
    "name", ["model.layers.x.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias", "other"]
)
def test_a_tensor_without_a_place_is_refused_by_name(name: str) -> None:
    with pytest.raises(CheckpointError, match="no place"):
        gguf_llama.name_in_gguf(name)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OPTForCausalLM"]}))
    with pytest.raises(CheckpointError, match="not a Llama"):
        gguf_llama.write_llama(tmp_path, tmp_path / "x.gguf")


def test_a_tensor_of_another_size_than_its_shape_leaves_no_file(tmp_path: Path) -> None:
    tensor = gguf.GgufTensor("a", gguf.F32, (3,), lambda: np.zeros(2, "<f4"))
    with pytest.raises(ValueError, match="a: 8 bytes, its shape says 12"):
        gguf.write(tmp_path / "x.gguf", {}, [tensor])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_llama_cpp_computes_the_logits_of_transformers(model_dir: Path, file: Path) -> None:
    """In a process of its own: two OpenMP runtimes in one are not worth the trouble."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")

    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 1000, (1, 12), generator=torch.Generator().manual_seed(5))
    code = (
        "import json, sys, llama_cpp\n"
        "settings = dict(n_ctx=16, n_threads=1, logits_all=True, verbose=False)\n"
        "llama = llama_cpp.Llama(sys.argv[1], **settings)\n"
        "llama.eval(json.loads(sys.argv[2]))\n"
        "print(json.dumps(llama.scores[:12].tolist()))\n"
    )
    argv = [sys.executable, "-c", code, str(file), json.dumps(ids[0].tolist())]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    theirs = torch.tensor(json.loads(done.stdout))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        ours = model(ids).logits[0]
    # llama.cpp rounds activations to bf16 before each product.
    torch.testing.assert_close(theirs, ours, rtol=0, atol=0.02)
    assert float(ours.std()) > 0.1, "a model that says nothing would agree with everything"
