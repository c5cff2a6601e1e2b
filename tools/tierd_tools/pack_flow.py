"""How many tensors may be on their way at a time: threads, and the memory of the packer.

A tensor takes first its source and a little more, when it is encoded only what it was encoded to,
and nothing once it is written.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tierd_tools.in_flight import in_order
from tierd_tools.pack_tensor import BAND_BYTES, EncodedTensor, TensorEncoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Executor

    from tierd_tools.pack_plan import PlannedTensor
    from tierd_tools.pack_tensor import Norms

#: more would only wait for memory bandwidth and the disk
MAX_WORKERS = 8
#: what the packer may take beside its two largest tensors
SLACK_BYTES = 1 << 30
#: ... of which this is for threads, temporaries, the index and the allocator
_RESERVE_SHARE = 0.5


def limit_bytes(tensors: Sequence[PlannedTensor]) -> int:
    """How much tensors under way may take together."""
    sizes = sorted((tensor.source.nbytes for tensor in tensors), reverse=True)
    return sum(sizes[:2]) + int(SLACK_BYTES * (1 - _RESERVE_SHARE))


def cost_bytes(tensor: PlannedTensor) -> int:
    """The most that a tensor takes from its admission until it is encoded.

    Its source; and as bands are encoded, and their source given back, not more in all than the
    dense bytes and the bitmap, one bit for each element of at least 16.
    """
    if tensor.codec == "dense":
        return tensor.source.nbytes
    return tensor.source.nbytes + tensor.source.nbytes // 16 + min(BAND_BYTES, tensor.source.nbytes)


@contextmanager
def encoding(
    tensors: Sequence[PlannedTensor], prune: str, group: int, norms: Norms
) -> Iterator[Iterator[EncodedTensor]]:
    """Gives the encoded `tensors`, in order; the arrays of each until the next is asked for.

    Leaving the context stops the threads.
    """
    workers = min(MAX_WORKERS, len(os.sched_getaffinity(0)))
    bands = ThreadPoolExecutor(workers, thread_name_prefix="tierd-band")
    pool = ThreadPoolExecutor(workers, thread_name_prefix="tierd-tensor")
    encoder = TensorEncoder(prune, group, norms, bands)
    try:
        yield encoded_in_order(pool, encoder.encode, tensors, ahead=2 * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bands.shutdown(wait=True)


def encoded_in_order(
    pool: Executor,
    encode: Callable[[PlannedTensor], EncodedTensor],
    tensors: Sequence[PlannedTensor],
    *,
    ahead: int,
) -> Iterator[EncodedTensor]:
    """As many tensors at a time as fit."""
    results = in_order(
        pool,
        encode,
        tensors,
        cost_bytes=cost_bytes,
        result_bytes=lambda encoded: encoded.nbytes,
        limit_bytes=limit_bytes(tensors),
        ahead=ahead,
    )
    for encoded in results:
        yield encoded
        encoded.arrays.clear()  # whoever asked for it may still hold it
