"""The models of the benchmarks: python -m tierd_tools.gpu_acceptance.models OUT [MODELS]

OUT/packs/large and OUT/packs/small are packs, OUT/reference is the checkpoint that `large` unpacks
to: the model in memory that it is compared with. `large` is the first checkpoint in MODELS, else
random weights. OUT/offloaded/pack and OUT/offloaded/model are one model whose layers are so large
that moving them takes longer than launching what computes with them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tierd_tools import pack, random_model, unpack

#: 0.7 GB in bf16, 0.27 GB packed: what one process makes within half a minute.
LARGE = random_model.Shape(
    hidden=2048, intermediate=5632, layers=6, heads=32, kv_heads=4, vocabulary=32000
)
#: 2.9 GB in bf16: 14 decoder layers of 201 MB.
OFFLOADED = random_model.Shape(
    hidden=3072, intermediate=8192, layers=14, heads=24, kv_heads=8, vocabulary=8000
)


def prepare(out: Path, models: Path | None) -> None:
    """What is there already stays."""
    large, reference = out / "packs" / "large", out / "reference"
    source = _first(models) if models else None
    out.mkdir(parents=True, exist_ok=True)
    if not large.exists():
        if source is None:
            source = out / "model"
            random_model.write(source, LARGE)
        large.parent.mkdir(exist_ok=True)
        pack.pack(source, large, prune="magnitude", sparsity=0.5)
    if not reference.exists():
        unpack.unpack(large, reference)
    random_model.write_pack(out / "packs" / "small", random_model.TINY)


def prepare_offloaded(out: Path, shape: random_model.Shape = OFFLOADED) -> None:
    """What is there already stays. The checkpoint is pruned by half before it is packed, so that
    both are one model."""
    model, pack_dir = out / "offloaded" / "model", out / "offloaded" / "pack"
    random_model.write(model, shape, sparsity=0.5, alike=True)
    if not pack_dir.exists():
        pack.pack(model, pack_dir)


def _first(models: Path) -> Path:
    """The first Hugging Face checkpoint in the folder, or the folder itself where it is one."""
    found = [
        path for path in (models, *sorted(models.iterdir())) if (path / "config.json").is_file()
    ]
    if not found:
        raise SystemExit(f"MODELS={models}: no folder in it has a config.json")
    return found[0]


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    prepare_offloaded(Path(sys.argv[1]))
