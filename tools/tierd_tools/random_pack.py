"""A pack of random bytes: for whoever measures reads, and needs no model."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import numpy as np

from tierd_layouts.container import LayerBuilder, write_index, write_shard
from tierd_layouts.index import PackIndex

if TYPE_CHECKING:
    from pathlib import Path


def write(pack: Path, layers: int, layer_bytes: int) -> None:
    """Write `layers` layers of one dense tensor each into one shard; a pack that is there is left
    as it is. layer_bytes: a multiple of 4 KiB."""
    if pack.exists():
        return
    unfinished = pack.with_name(f".{pack.name}-{os.getpid()}")
    unfinished.mkdir(parents=True)
    rng = np.random.default_rng(0)
    encoded = []
    for number in range(layers):
        builder = LayerBuilder(f"model.layers.{number}")
        data = rng.bytes(layer_bytes)
        builder.add_dense(f"model.layers.{number}.weight", "BF16", (layer_bytes // 2,), data)
        encoded.append(builder.finish())
    shard, records = write_shard(unfinished / "tierd-00001.safetensors", 0, encoded)
    (unfinished / "config.json").write_text(json.dumps({"model_type": "random"}))
    index = PackIndex(
        version=1,
        tool="random_pack",
        source_digest="0" * 16,
        shards=(shard,),
        layers=tuple(records),
    )
    write_index(unfinished, index)
    unfinished.rename(pack)
