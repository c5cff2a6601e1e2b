"""A Llama checkpoint in bf16 as the GGUF that llama.cpp runs: every weight with its own bits.

llama.cpp rotates neighbouring rows of q and k where transformers rotates the two halves of a head,
so those rows are reordered, as llama.cpp's own converter does; vectors become float32, exactly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_tools.checkpoint import CONFIG, Checkpoint, read_config
from tierd_tools.errors import CheckpointError
from tierd_tools.peers import gguf

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from tierd_tools.checkpoint import SourceTensor

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_MOSTLY_BF16 = 32  # general.file_type


def write_llama(model_dir: Path, path: Path) -> None:
    """Write `path` from a checkpoint of LlamaForCausalLM; no tokenizer goes with it.

    Raises CheckpointError for another architecture, a tensor that is not bf16 or has no place.
    """
    config = read_config(model_dir / CONFIG)
    if config.get("architectures") != ["LlamaForCausalLM"]:
        raise CheckpointError(f"{model_dir}: {config.get('architectures')} is not a Llama")
    tensors = [_tensor(source, config) for source in Checkpoint.open(model_dir).tensors.values()]
    tensors.sort(key=_order)
    gguf.write(path, _metadata(config), tensors)


def name_in_gguf(name: str) -> str:
    """Raises CheckpointError for a tensor that llama.cpp's Llama has no place for."""
    if name in _OUTER:
        return _OUTER[name]
    prefix, _, rest = name.partition("model.layers.")
    number, _, inner = rest.partition(".")
    module = inner.removesuffix(".weight")
    if prefix or not number.isdigit() or module == inner or module not in _IN_LAYER:
        raise CheckpointError(f"tensor {name!r} has no place in a GGUF of a Llama")
    return f"blk.{number}.{_IN_LAYER[module]}.weight"


def neighbours(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows of q or k, the halves of each head interleaved."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def _metadata(config: dict[str, Any]) -> dict[str, gguf.Value]:
    heads = config["num_attention_heads"]
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    return {
        "general.architecture": "llama",
        "general.name": "llama",
        "general.file_type": _MOSTLY_BF16,
        "general.alignment": gguf.ALIGNMENT,
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "llama.rope.dimension_count": config["hidden_size"] // heads,
        "llama.rope.freq_base": float(theta),
        "tokenizer.ggml.model": "no_vocab",
    }


def _tensor(source: SourceTensor, config: dict[str, Any]) -> gguf.GgufTensor:
    if source.dtype != "BF16":
        raise CheckpointError(f"tensor {source.name!r} is {source.dtype}, not BF16")
    name = name_in_gguf(source.name)
    if len(source.shape) == 1:
        return gguf.GgufTensor(name, gguf.F32, source.shape, lambda: _widened(source))
    for kind, heads in (("attn_q", "num_attention_heads"), ("attn_k", "num_key_value_heads")):
        if f".{kind}." in name:
            return gguf.GgufTensor(name, gguf.BF16, source.shape, _reordered(source, config[heads]))
    return gguf.GgufTensor(name, gguf.BF16, source.shape, source.read_bits)


def _reordered(source: SourceTensor, heads: int) -> Callable[[], NDArray[Any]]:
    return lambda: neighbours(source.read_bits(), heads)


def _widened(source: SourceTensor) -> NDArray[np.float32]:
    return (source.read_bits().astype("<u4") << 16).view("<f4")


def _order(tensor: gguf.GgufTensor) -> tuple[int, int]:
    """As they are used, so that a pass is a pass over the file: the embedding first, which is read
    a row at a time and, where it is tied, whole at the end."""
    kind, _, rest = tensor.name.partition(".")
    if kind == "blk":
        return 1, int(rest.partition(".")[0])
    return (0, 0) if kind == "token_embd" else (2, 0)
