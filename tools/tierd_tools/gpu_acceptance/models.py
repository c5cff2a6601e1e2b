"""The models of the benchmarks: python -m tierd_tools.gpu_acceptance.models OUT [MODELS]

OUT/packs/large and OUT/packs/small are packs, OUT/reference is the checkpoint that `large` unpacks
to: the model in memory that it is compared with. `large` is the first checkpoint in MODELS, else
random weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tierd_tools import pack, random_model, unpack

#: 0.7 GB in bf16, 0.27 GB packed: what one process makes within half a minute.
LARGE = random_model.Shape(
    hidden=2048, intermediate=5632, layers=6, heads=32, kv_heads=4, vocabulary=32000
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
