"""Many tensors through a few threads, in order, within a bound on memory.

A tensor is admitted when what it may take, beside all that are under way, fits the limit: first its
source and a little more, when it is encoded only what it was encoded to, nothing once it is
written. One tensor is always admitted, so the limit must not be below the largest.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tierd_tools.pack_tensor import BAND_BYTES, EncodedTensor, TensorEncoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

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
        yield _in_order(pool, encoder.encode, tensors, ahead=2 * workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        bands.shutdown(wait=True)


class _UnderWay:
    """The bytes of the tensors that are admitted and not yet written."""

    def __init__(self, limit: int) -> None:
        self.changed = threading.Condition()
        self._limit = limit
        self._nbytes = 0

    def fits(self, nbytes: int) -> bool:
        return not self._nbytes or self._nbytes + nbytes <= self._limit

    def add(self, nbytes: int) -> None:
        """`nbytes` may be negative."""
        with self.changed:
            self._nbytes += nbytes
            self.changed.notify_all()


def _in_order(
    pool: ThreadPoolExecutor,
    encode: Callable[[PlannedTensor], EncodedTensor],
    tensors: Sequence[PlannedTensor],
    *,
    ahead: int,
) -> Iterator[EncodedTensor]:
    under_way = _UnderWay(limit_bytes(tensors))

    def admitted(tensor: PlannedTensor) -> EncodedTensor:
        encoded = encode(tensor)
        under_way.add(encoded.nbytes - cost_bytes(tensor))
        return encoded

    running: deque[Future[EncodedTensor]] = deque()
    waiting = deque(tensors)

    def next_fits() -> bool:
        return bool(waiting) and len(running) < ahead and under_way.fits(cost_bytes(waiting[0]))

    while waiting or running:
        with under_way.changed:
            under_way.changed.wait_for(lambda: next_fits() or (running and running[0].done()))
        while next_fits():
            tensor = waiting.popleft()
            under_way.add(cost_bytes(tensor))
            future = pool.submit(admitted, tensor)
            future.add_done_callback(lambda _: under_way.add(0))
            running.append(future)
        if running[0].done():
            encoded = running.popleft().result()
            nbytes = encoded.nbytes
            yield encoded
            encoded.arrays.clear()
            under_way.add(-nbytes)
