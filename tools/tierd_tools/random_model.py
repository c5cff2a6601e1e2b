"""A Llama checkpoint of a chosen size with random weights, for machines without a model."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tierd_tools import pack

INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that make a Llama checkpoint as large as it is."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int


#: 1.45 GB in bf16: 15 decoder layers of 88 MB and a tied embedding of 131 MB.
FULL = Shape(hidden=2048, intermediate=5632, layers=15, heads=32, kv_heads=4, vocabulary=32000)
#: 0.2 GB in bf16: for `make demo SIZE=small`, which every test run does.
SMALL = Shape(hidden=1024, intermediate=2816, layers=9, heads=16, kv_heads=4, vocabulary=8000)

#: 1 MB: for tests, and for the layer that `make bench ONLY=acquire` asks for.
TINY = Shape(hidden=256, intermediate=512, layers=2, heads=4, kv_heads=4, vocabulary=1000)


def config(shape: Shape) -> dict[str, object]:
    """What config.json says of a model of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": None,
        "dtype": "bfloat16",
    }


def write(
    model_dir: Path,
    shape: Shape,
    seed: int = 0,
    *,
    sparsity: float | None = None,
    alike: bool = False,
) -> None:
    """Write config.json and one safetensors shard a layer; a finished folder is left as it is.

    sparsity: of the linear layers, their smallest weights zero. alike: all layers have the weights
    of the first, which is all the same where only bytes and time count, and sooner done.
    """
    if (model_dir / "config.json").exists():
        return
    import torch
    from safetensors.torch import save_file

    from tierd_tools.matrix_set import pruned

    generator = torch.Generator().manual_seed(seed)

    def values(rows: int, cols: int) -> torch.Tensor:
        return (torch.randn(rows, cols, generator=generator) * INIT_STD).to(torch.bfloat16)

    def weight(rows: int, cols: int) -> torch.Tensor:
        return values(rows, cols) if sparsity is None else pruned(values(rows, cols), sparsity)

    model_dir.mkdir(parents=True, exist_ok=True)
    head_dim = shape.hidden // shape.heads
    weight_map: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, str(model_dir / file), metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))

    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    save(
        "model-embedding.safetensors",
        {
            "model.embed_tokens.weight": values(shape.vocabulary, shape.hidden),
            "model.norm.weight": ones.clone(),
        },
    )
    kv = shape.kv_heads * head_dim
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        if not tensors or not alike:
            tensors = {
                "self_attn.q_proj.weight": weight(shape.hidden, shape.hidden),
                "self_attn.k_proj.weight": weight(kv, shape.hidden),
                "self_attn.v_proj.weight": weight(kv, shape.hidden),
                "self_attn.o_proj.weight": weight(shape.hidden, shape.hidden),
                "mlp.gate_proj.weight": weight(shape.intermediate, shape.hidden),
                "mlp.up_proj.weight": weight(shape.intermediate, shape.hidden),
                "mlp.down_proj.weight": weight(shape.hidden, shape.intermediate),
                "input_layernorm.weight": ones.clone(),
                "post_attention_layernorm.weight": ones.clone(),
            }
        named = {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}
        save(f"model-layer-{layer:03d}.safetensors", named)
    index = {"metadata": {"format": "pt"}, "weight_map": weight_map}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    # config.json last: its presence says that the folder is complete.
    (model_dir / "config.json").write_text(json.dumps(config(shape), indent=1))


def write_pack(pack_dir: Path, shape: Shape) -> None:
    """Write the model, pruned to 50 % and packed; a pack that is there is left as it is."""
    if pack_dir.exists():
        return
    pack_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=pack_dir.parent, prefix=".random-") as folder:
        model_dir = Path(folder) / "model"
        write(model_dir, shape)
        pack.pack(model_dir, pack_dir, prune="magnitude", sparsity=0.5)
