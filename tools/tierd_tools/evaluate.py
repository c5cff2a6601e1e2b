"""How well and how fast a pack writes: perplexity over a text, and tokens per second.

The pack is served by a daemon of its own and run by `tierd_client.load_model`, as users run it.
Everything computes in the dtype of the model's config: a bf16 model is scored in bf16, with
quantised weights rounded to bf16 as well (only the products of a few rows, in decoding with
`compute="fused"`, use them unrounded). Log probabilities are float32, their sum float64.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tierd_client.errors import TierdError
from tierd_client.load import load_model
from tierd_layouts.container import open_pack
from tierd_layouts.index import ARRAY_ALIGNMENT
from tierd_tools.diagnostics import ask
from tierd_tools.errors import BadSetting, EvaluationError
from tierd_tools.progress import SilentProgress
from tierd_tools.quantities import size
from tierd_tools.serving import serve
from tierd_tools.sparsity import is_linear
from tierd_tools.token_windows import consecutive, read_tokens

if TYPE_CHECKING:
    import os

    from tierd_layouts.index import PackIndex
    from tierd_tools.progress import Progress

WINDOWS, WINDOW_TOKENS = 60, 256
#: scored at once: a pass over the weights serves them all, and their logits are in memory
_BATCH_TOKENS = 1024
_NEW_TOKENS = 32


@dataclass(frozen=True, slots=True)
class EvalReport:
    """What one evaluation found. Linear layers are the 2-D weights of the numbered layers."""

    pack_dir: str
    text: str
    windows: int
    window_tokens: int
    compute: str
    dtype: str  #: of the model, and so of the arithmetic
    threads: int
    perplexity: float
    scored_tokens: int
    scored_tokens_per_s: float
    decoded_tokens: int
    decoded_tokens_per_s: float  #: greedy, one row, without the prompt and the first token
    ssd_read_bytes: int
    pack_bytes: int
    dense_bytes: int
    linear_bytes: int  #: with every array's padding
    linear_dense_bytes: int
    codecs: dict[str, int]  #: of the linear layers: how many have each

    @property
    def linear_ratio(self) -> float:
        return self.linear_dense_bytes / self.linear_bytes if self.linear_bytes else 1.0

    def summary(self) -> str:
        codecs = ", ".join(f"{count} {name}" for name, count in self.codecs.items())
        return "\n".join(
            (
                f"perplexity {self.perplexity:.2f} over {self.windows} windows of "
                f"{self.window_tokens} tokens ({self.dtype}, {self.compute})",
                f"{self.scored_tokens_per_s:,.0f} tokens/s scoring, "
                f"{self.decoded_tokens_per_s:,.1f} tokens/s greedy decoding "
                f"({self.threads} threads)",
                f"linear layers {size(self.linear_bytes)} of {size(self.linear_dense_bytes)} "
                f"({self.linear_ratio:.2f}x; {codecs})",
                f"pack {size(self.pack_bytes)} of {size(self.dense_bytes)}, "
                f"{size(self.ssd_read_bytes)} read from the SSD",
            )
        )


def evaluate(
    pack_dir: str | os.PathLike[str],
    text_path: str | os.PathLike[str],
    *,
    windows: int = WINDOWS,
    window_tokens: int = WINDOW_TOKENS,
    compute: str = "fused",
    dram: str | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Scores the first windows of the text, each token but a window's first, and decodes a little.

    compute: as for `load_model`; scoring has so many rows that both are the same. dram: the
    daemon's budget ("4GiB"); None leaves it to the daemon: half of what is free. Raises BadSetting,
    TextRefused, a FormatError for what is no pack, NoDaemon, and EvaluationError when the model
    cannot be run.
    """
    if compute not in ("dense", "fused"):
        raise BadSetting(f"compute {compute!r} is unknown: dense, fused")
    path = Path(pack_dir).resolve()
    index = open_pack(path)
    batch = consecutive(read_tokens(path, text_path), windows, window_tokens, where=str(text_path))
    flags = ["--pack", str(path), "--no-populate", "--log-level", "error"]
    flags += ["--dram", dram] if dram else []
    with serve(flags) as daemon:
        try:
            model: Any = load_model(path, compute=compute, socket=daemon.socket)
            with model.tierd, torch.inference_mode():
                _refuse_long(model, window_tokens)
                loss, seconds = _score(model, batch, index.pack_bytes, progress)
                decoded, decode_seconds = _decode(model, batch[0])
        except TierdError as error:
            raise EvaluationError(f"{pack_dir}: {error}") from error
        read_bytes = ask(daemon.socket, "status")["ssd"]["read_bytes"]
    scored = windows * (window_tokens - 1)
    linear_bytes, linear_dense_bytes, codecs = _linear_sizes(index)
    return EvalReport(
        pack_dir=str(path),
        text=str(text_path),
        windows=windows,
        window_tokens=window_tokens,
        compute=compute,
        dtype=str(model.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        perplexity=_perplexity(loss / scored),
        scored_tokens=scored,
        scored_tokens_per_s=windows * window_tokens / seconds,
        decoded_tokens=decoded,
        decoded_tokens_per_s=(decoded - 1) / decode_seconds,
        ssd_read_bytes=read_bytes,
        pack_bytes=index.pack_bytes,
        dense_bytes=index.dense_bytes,
        linear_bytes=linear_bytes,
        linear_dense_bytes=linear_dense_bytes,
        codecs=codecs,
    )


def _refuse_long(model: Any, window_tokens: int) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and window_tokens > longest:
        raise BadSetting(f"windows of {window_tokens} tokens: the model takes at most {longest}")


def _score(
    model: Any, windows: torch.Tensor, pack_bytes: int, progress: Progress | None
) -> tuple[float, float]:
    """The sum of the losses of all scored tokens, in nats, and the seconds that it took."""
    rows = max(1, _BATCH_TOKENS // windows.shape[1])
    batches = [windows[begin : begin + rows] for begin in range(0, len(windows), rows)]
    loss = 0.0
    begin = time.perf_counter()
    with (progress or SilentProgress()).stage("scoring", pack_bytes * len(batches)) as stage:
        for batch in batches:
            logits = model(input_ids=batch, use_cache=False).logits
            for row, ids in zip(logits, batch, strict=True):  # float32 of one window at a time
                loss += torch.nn.functional.cross_entropy(
                    row[:-1].float(), ids[1:], reduction="sum"
                ).item()
            stage.advance(pack_bytes)
    return loss, time.perf_counter() - begin


class _TokenClock:
    """A `generate` streamer that notes when each token came; the prompt comes first."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def _decode(model: Any, window: torch.Tensor) -> tuple[int, float]:
    """How many tokens were decoded, and the seconds from the first of them to the last."""
    prompt = window[None, : max(1, len(window) // 2)]
    new_tokens = max(2, min(_NEW_TOKENS, len(window) - prompt.shape[1]))
    clock = _TokenClock()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        streamer=clock,
    )
    return len(clock.at) - 1, clock.at[-1] - clock.at[1]


def _perplexity(loss: float) -> float:
    """Of a loss per token. Raises EvaluationError for a loss that stands for no number."""
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    if not math.isfinite(perplexity):
        raise EvaluationError(f"the loss is {loss} nats a token: there is no perplexity")
    return perplexity


def _linear_sizes(index: PackIndex) -> tuple[int, int, dict[str, int]]:
    """Stored bytes, dense bytes and codecs of the linear layers."""
    linear = [
        tensor
        for layer in index.layers
        for tensor in layer.tensors
        if is_linear(tensor.name) and len(tensor.shape) == 2
    ]
    arrays = [array for tensor in linear for array in tensor.arrays.values()]
    stored = sum(-(-array.nbytes // ARRAY_ALIGNMENT) * ARRAY_ALIGNMENT for array in arrays)
    codecs = Counter(tensor.codec for tensor in linear)
    return stored, sum(tensor.dense_bytes for tensor in linear), dict(sorted(codecs.items()))
