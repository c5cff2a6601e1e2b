"""Every weight of a pack, decoded, once: layer by layer, in as many threads as there are cores."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from tierd_kernels import KernelError, expand
from tierd_layouts.container import packed_matrix, read_layer, tensor_bits
from tierd_layouts.dtypes import ITEM_BYTES, UNSIGNED
from tierd_tools.errors import VerifyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tierd_layouts.index import PackIndex, Tensor
    from tierd_tools.progress import Stage

    Bits = NDArray[np.unsignedinteger[Any]]


def for_each_weight(
    folder: int,
    index: PackIndex,
    visit: Callable[[Tensor, Bits], None],
    stage: Stage,
    *,
    where: str,
) -> None:
    """Calls `visit` with every stored tensor and its elements, in threads and in no fixed order.

    Every layer is verified before it is used. Needs the memory of one layer and of as many of its
    tensors, dense, as there are threads. `stage` advances by dense bytes.
    Raises FormatError or VerifyError for a pack that is not right, and what `visit` raises.
    """
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for layer in index.layers:
            content = read_layer(folder, index, layer, where=where)

            def decode(tensor: Tensor, content: bytes = content) -> int:
                visit(tensor, weight_bits(content, tensor, where=where))
                return tensor.dense_bytes

            for nbytes in pool.map(decode, layer.tensors):
                stage.advance(nbytes)


def weight_bits(content: bytes, tensor: Tensor, *, where: str) -> Bits:
    """The elements of a tensor; of a lossy codec, rounded to the tensor's dtype.

    content: the bytes of its layer. Raises VerifyError where they are no matrix.
    """
    if tensor.codec == "dense":
        return tensor_bits(content, tensor)
    bits = np.empty(tensor.shape, UNSIGNED[ITEM_BYTES[tensor.dtype]])
    try:
        expand(packed_matrix(content, tensor), bits, threads=1)
    except KernelError as error:
        raise VerifyError(f"{where}: tensor {tensor.name!r}: {error}") from error
    return bits
