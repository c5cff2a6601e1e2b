"""Checkpoints of every architecture that is promised, with random sizes, ties and biases."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
