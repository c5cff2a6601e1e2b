"""What the linear layers of a model see while it reads a text: the norms that Wanda prunes by.

Layer by layer: one decoder layer's tensors are read, its inputs measured, the layer pruned, and its
outputs with the pruned weights are the inputs of the next, as in Wanda's own code (Sun et al. 2023,
arXiv 2306.11695). Beside one layer and the embeddings only the hidden states of the text are in
memory, so a model larger than memory can be calibrated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from tierd_tools.errors import CalibrationError
from tierd_tools.layered_model import LayeredModel
from tierd_tools.pack_settings import DEFAULT_WINDOWS
from tierd_tools.progress import SilentProgress
from tierd_tools.prune import DTYPES
from tierd_tools.token_windows import read_tokens, spread
from tierd_tools.wanda import wanda

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from tierd_tools.checkpoint import Checkpoint
    from tierd_tools.layered_model import Place
    from tierd_tools.progress import Progress

WINDOW_TOKENS = 256
#: bytes of an element -> the types that show its bits to torch and to `wanda`
_INTEGERS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}


class Shares(Protocol):
    """What `Sparsities` is to this module."""

    def of(self, tensor_name: str) -> float:
        """The share of zeros that the tensor is to have."""


def input_norms(
    checkpoint: Checkpoint,
    text_path: str | os.PathLike[str],
    sparsities: Shares,
    *,
    windows: int = DEFAULT_WINDOWS,
    window_tokens: int = WINDOW_TOKENS,
    progress: Progress | None = None,
) -> dict[str, NDArray[np.float32]]:
    """L2 norms of the input features of every nn.Linear in the decoder layers, by its checkpoint
    name: float32[cols], over windows spread evenly over the text.

    Computes in the checkpoint's dtype with torch's threads, on windows no longer than the model
    takes; sums in float64, in the order of the windows. Raises TextRefused, CheckpointError, and
    CalibrationError for a model that cannot be run layer by layer, a tensor to be pruned that is no
    nn.Linear of a decoder layer or that the text does not use, and activations that overflow.
    """
    tokens = read_tokens(checkpoint.path, text_path)
    model = LayeredModel(checkpoint)
    _refuse_unreachable(checkpoint, model, sparsities)
    batch = spread(
        tokens,
        windows,
        min(window_tokens, model.max_tokens or window_tokens),
        where=str(text_path),
    )
    outputs: list[Any] = [None] * windows
    norms: dict[str, NDArray[np.float32]] = {}
    sizes = [sum(place.source.nbytes for place in layer) for layer in model.layers]
    stages = progress or SilentProgress()
    with stages.stage("calibrating", sum(sizes)) as stage, torch.inference_mode():
        for number, size in enumerate(sizes):
            with model.loaded(number) as layer:
                linears = [place for place in layer if place.linear]
                sums = _Sums(linears)
                measured = [
                    model.output_of(number, ids[None], before)
                    for ids, before in zip(batch, outputs, strict=True)
                ]
                norms |= sums.norms(model.kind, sparsities)
                if _prune(linears, norms, sparsities) and number + 1 < len(sizes):
                    del measured
                    for i, ids in enumerate(batch):
                        outputs[i] = model.output_of(number, ids[None], outputs[i])
                else:
                    outputs = measured
            stage.advance(size)
    return norms


def _refuse_unreachable(checkpoint: Checkpoint, model: LayeredModel, sparsities: Shares) -> None:
    wanted = [
        name
        for name, tensor in checkpoint.tensors.items()
        if len(tensor.shape) == 2 and tensor.dtype in DTYPES and sparsities.of(name) > 0
    ]
    missing = sorted(name for name in wanted if name not in model.linears)
    if missing:
        raise CalibrationError(
            f"{model.kind}: {len(missing)} of {len(wanted)} tensors to be pruned are not the "
            f"weight of an nn.Linear in a decoder layer: {', '.join(missing[:4])}; leave them out"
        )


class _Sums:
    """Sums of the squared inputs of a layer's linears, taken while the layer runs."""

    def __init__(self, linears: Sequence[Place]) -> None:
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._handles = [
            place.module.register_forward_pre_hook(self._hook(place.source.name), with_kwargs=True)
            for place in linears
        ]
        self._names = [place.source.name for place in linears]

    def _hook(self, name: str) -> Any:
        def add(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x: torch.Tensor = args[0] if args else kwargs["input"]
            squares = x.reshape(-1, x.shape[-1]).float().square().sum(0, dtype=torch.float64)
            self._sums[name] = self._sums.get(name, 0.0) + squares.numpy()

        return add

    def norms(self, kind: str, sparsities: Shares) -> dict[str, NDArray[np.float32]]:
        """Ends the measurement."""
        for handle in self._handles:
            handle.remove()
        unused = [n for n in self._names if n not in self._sums and sparsities.of(n) > 0]
        if unused:
            raise CalibrationError(
                f"{kind}: the calibration text does not use {len(unused)} tensors that are to be "
                f"pruned: {', '.join(unused[:4])}"
            )
        norms = {name: np.sqrt(total).astype(np.float32) for name, total in self._sums.items()}
        for name, norm in norms.items():
            if not np.isfinite(norm).all():
                raise CalibrationError(f"{kind}: the inputs of {name} overflow or are not numbers")
        return norms


def _prune(
    linears: Sequence[Place], norms: Mapping[str, NDArray[np.float32]], sparsities: Shares
) -> bool:
    """Puts the pruned weights in place; whether any changed."""
    changed = False
    for place in linears:
        source = place.source
        sparsity = sparsities.of(source.name)
        if sparsity > 0:
            weight: Any = place.module.weight
            integer, unsigned = _INTEGERS[weight.dtype.itemsize]
            bits = weight.view(integer).numpy().view(unsigned)
            pruned = wanda(bits, source.dtype, norms[source.name], sparsity)
            if pruned is not bits:
                place.put(torch.from_numpy(pruned).view(weight.dtype))
                changed = True
    return changed
