"""Source tensors to encoded layers: read, prune, encode, in a few threads, in order.

numpy releases the interpreter lock in nearly all of this. A bounded number of tensors is ahead of
the one that is asked for, so the memory is that of a few tensors beside the layers of two shards:
one that is filled and one that is being written.
"""

from __future__ import annotations

import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from tierd_layouts.container import Chunk, EncodedLayer, LayerBuilder
from tierd_layouts.dtypes import ITEM_BYTES
from tierd_layouts.index import ARRAY_ALIGNMENT, PAGE_BYTES
from tierd_layouts.tiles import TileGrid
from tierd_tools.prune import magnitude

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tierd_layouts.index import Tensor
    from tierd_tools.pack_plan import PlannedTensor

#: more would only wait for memory bandwidth and the disk
MAX_WORKERS = 8


@dataclass(frozen=True, slots=True)
class EncodedTensor:
    """One tensor as a layer of its own, to be joined with the others of its layer."""

    part: EncodedLayer
    source_bytes: int
    source_digest: str  #: xxh3_128 of the source's bytes, before pruning


@contextmanager
def encoding(
    tensors: Sequence[PlannedTensor], sparsity: float | None
) -> Iterator[Iterator[EncodedTensor]]:
    """Gives the encoded `tensors`, in order. Leaving the context stops the threads."""
    workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tierd-encode")
    try:
        yield _in_order(pool, tensors, sparsity, ahead=workers + 1)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def encode_tensor(tensor: PlannedTensor, sparsity: float | None) -> EncodedTensor:
    """Reads, prunes and encodes one tensor: `raw` where the plan allows it and it is smaller."""
    source = tensor.source
    data = source.read()
    digest = xxhash.xxh3_128_hexdigest(data.data)
    if tensor.raw:
        bits = data.view(f"<u{ITEM_BYTES[source.dtype]}").reshape(source.shape)
        if tensor.prune and sparsity is not None:
            bits = magnitude(bits, source.dtype, sparsity)
            data = bits.reshape(-1).view(np.uint8)
        if _least_raw_bytes(bits) < source.nbytes:
            builder = LayerBuilder(source.name)
            stored = builder.add_raw(source.name, source.dtype, bits)
            if sum(array.nbytes for array in stored.arrays.values()) < source.nbytes:
                return EncodedTensor(builder.finish(), source.nbytes, digest)
    builder = LayerBuilder(source.name)
    builder.add_dense(source.name, source.dtype, source.shape, data.data)
    return EncodedTensor(builder.finish(), source.nbytes, digest)


def join(name: str, parts: Sequence[EncodedLayer]) -> EncodedLayer:
    """One layer `name` of the tensors of `parts`, in this order, each array on 256 bytes."""
    tensors: list[Tensor] = []
    chunks: list[Chunk] = []
    end = 0
    for part in parts:
        base = -(-end // ARRAY_ALIGNMENT) * ARRAY_ALIGNMENT
        for tensor in part.tensors:
            arrays = {
                key: replace(array, offset=base + array.offset)
                for key, array in tensor.arrays.items()
            }
            tensors.append(replace(tensor, arrays=arrays))
            end = max(array.offset + array.nbytes for array in arrays.values())
        chunks += [Chunk(base + chunk.offset, chunk.data) for chunk in part.chunks]
    nbytes = max(1, -(-end // PAGE_BYTES)) * PAGE_BYTES
    return EncodedLayer(name, tuple(tensors), tuple(chunks), nbytes)


def _in_order(
    pool: ThreadPoolExecutor,
    tensors: Sequence[PlannedTensor],
    sparsity: float | None,
    *,
    ahead: int,
) -> Iterator[EncodedTensor]:
    running: deque[Future[EncodedTensor]] = deque()
    for tensor in tensors:
        running.append(pool.submit(encode_tensor, tensor, sparsity))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _least_raw_bytes(bits: np.ndarray) -> int:
    """What `raw` needs at least: the encoding is tried only when this can win."""
    grid = TileGrid(*bits.shape)
    kept = int(np.count_nonzero(bits)) * bits.dtype.itemsize
    return kept + 8 * grid.bitmap_words + 4 * grid.offset_count
