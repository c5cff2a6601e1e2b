"""Checkpoints of transformers that are saved in milliseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

SIZES: dict[str, Any] = {"hidden_size": 60, "intermediate_size": 100, "vocab_size": 90}
SIZES |= {"num_hidden_layers": 3, "num_attention_heads": 3, "dtype": torch.bfloat16}
IDS = torch.arange(3, 33).view(2, 15)  #: two sequences of their tokens


def save(config: Any, folder: Path) -> None:
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
