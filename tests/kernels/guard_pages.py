"""A program for test_guard_pages.py: kernels on arrays that end, or begin, at a forbidden page.

Prints each case before it runs, so that the last line names the one that died.
"""

import ctypes
import mmap
import sys
from typing import Any

import numpy as np

from tierd_kernels import cpu, reference
from tierd_kernels.geometry import Dtype, Geometry, tiles_over
from tierd_layouts import tiles

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []


def guarded(array: Any, *, at_end: bool, readonly: bool) -> Any:
    """Return a copy that touches a PROT_NONE page with its last (or first) byte."""
    inside = -(-max(array.nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, inside + 2 * PAGE)
    _kept.append(memory)
    start = PAGE + (inside - array.nbytes if at_end else 0)
    copy = np.frombuffer(memory, np.uint8)[start : start + array.nbytes]
    copy = copy.view(array.dtype).reshape(array.shape)
    copy[...] = array
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect(address, PAGE, 0)
    protect(address + PAGE + inside, PAGE, 0)
    if readonly:
        protect(address + PAGE, inside, mmap.PROT_READ)
        copy.flags.writeable = False
    return copy


def protect(address: int, nbytes: int, protection: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), protection) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def check(kernel: cpu.CpuKernel, rows: int, cols: int, dtype: Dtype, density: float) -> None:
    rng = np.random.default_rng(rows * 1000 + cols)
    element = np.uint32 if dtype == "F32" else np.uint16
    one = {"BF16": 0x3F80, "F16": 0x3C00, "F32": 0x3F800000}[dtype]
    matrix: Any = np.where(rng.random((rows, cols)) < density, one, 0).astype(element)
    for at_end in (True, False):
        bitmap, offsets, values = (
            guarded(array, at_end=at_end, readonly=True) for array in tiles.encode(matrix)
        )
        out = guarded(np.full_like(matrix, 7), at_end=at_end, readonly=False)
        total = tiles_over(rows)
        kernel.expand(bitmap, offsets, values, out, Geometry(cols, total, 0, total), 2)
        assert np.array_equal(out, matrix)
        if total > 1:
            part = guarded(np.full_like(matrix[64:], 7), at_end=at_end, readonly=False)
            kernel.expand(bitmap, offsets, values, part, Geometry(cols, total, 1, total), 2)
            assert np.array_equal(part, matrix[64:])
        for tokens in (1, 2, 9, 33):
            ones: Any = np.full((tokens, cols), one, element)
            x = guarded(ones, at_end=at_end, readonly=True)
            y = guarded(np.full((tokens, rows), 7, np.float32), at_end=at_end, readonly=False)
            kernel.linear(bitmap, offsets, values, x, y, dtype, 2)
            exact = np.full((tokens, 1), 1.0) * reference.decode(matrix, dtype).sum(axis=1)
            assert np.array_equal(y, exact)
        for memory in _kept:
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            protect(address, len(memory), mmap.PROT_READ | mmap.PROT_WRITE)
        _kept.clear()


def main(name: str) -> None:
    if name == "touch":
        array = guarded(np.zeros(4, np.uint8), at_end=True, readonly=True)
        ctypes.string_at(array.ctypes.data, 5)
        return
    kernel = cpu.CpuKernel(name)
    dtypes: tuple[Dtype, ...] = ("BF16", "F16", "F32")
    for dtype in dtypes:
        for density in (0.0, 0.01, 0.5, 1.0):
            for shape in ((1, 1), (64, 64), (64, 256), (65, 65), (130, 333), (63, 320), (1, 500)):
                print(name, dtype, density, shape, flush=True)
                check(kernel, *shape, dtype, density)
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
