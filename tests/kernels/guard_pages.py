"""A program for test_guard_pages.py: kernels on arrays that end, or begin, at a forbidden page.

Prints each case before it runs, so that the last line names the one that died.
"""

import ctypes
import mmap
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tierd_kernels import KernelError, PackedMatrix, cpu, reference
from tierd_kernels.geometry import ELEMENT, tiles_over

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_kept: list[mmap.mmap] = []
_random = runpy.run_path(str(Path(__file__).with_name("random_matrices.py")))


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


def guarded_matrix(matrix: PackedMatrix, *, at_end: bool) -> PackedMatrix:
    arrays = {
        name: guarded(array, at_end=at_end, readonly=True)
        for name, array in matrix.arrays().items()
    }
    return replace(matrix, **arrays)


def check(kernel: cpu.CpuKernel, matrix: PackedMatrix) -> None:
    total = tiles_over(matrix.rows)
    expected: Any = np.empty((matrix.rows, matrix.cols), ELEMENT[matrix.dtype])
    reference.expand(matrix, expected, 0, total, 1)
    rng = np.random.default_rng(0)
    for at_end in (True, False):
        inside = guarded_matrix(matrix, at_end=at_end)
        out = guarded(np.full_like(expected, 7), at_end=at_end, readonly=False)
        kernel.expand(inside, out, 0, total, 2)
        assert np.array_equal(out, expected)
        if total > 1:
            part = guarded(np.full_like(expected[64:], 7), at_end=at_end, readonly=False)
            kernel.expand(inside, part, 1, total, 2)
            assert np.array_equal(part, expected[64:])
        for tokens in (1, 2, 9, 33):
            bits: Any = rng.integers(0, 0x3C00, (tokens, matrix.cols)).astype(expected.dtype)
            x = guarded(bits, at_end=at_end, readonly=True)
            zeros = np.zeros((tokens, matrix.rows), np.float32)
            y = guarded(zeros, at_end=at_end, readonly=False)
            kernel.linear(inside, x, y, 2)
            kernel.linear(matrix, bits, zeros, 2)
            assert np.array_equal(y.view(np.uint32), zeros.view(np.uint32))
        release()


def check_hostile(kernel: cpu.CpuKernel, matrix: PackedMatrix, seed: int) -> int:
    """Return how often a matrix with a few wrong bits was refused. A wrong value is no matter here.

    Flips lie where a kernel is led by them: in all arrays, half of them in the last tile.
    """
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(8):
        arrays: dict[str, Any] = {name: array.copy() for name, array in matrix.arrays().items()}
        for _ in range(rng.integers(1, 4)):
            array = arrays[rng.choice(sorted(arrays))].view(np.uint8)
            last = array[-min(64, array.size) :]
            part = last if rng.random() < 0.5 else array
            part[rng.integers(part.size)] ^= 1 << rng.integers(8)
        inside = guarded_matrix(replace(matrix, **arrays), at_end=True)
        total = tiles_over(matrix.rows)
        out = np.empty((matrix.rows, matrix.cols), ELEMENT[matrix.dtype])
        written = guarded(out, at_end=True, readonly=False)
        x: Any = np.zeros((2, matrix.cols), out.dtype)
        product = guarded(np.zeros((2, matrix.rows), np.float32), at_end=True, readonly=False)
        try:
            kernel.expand(inside, written, 0, total, 1)
            kernel.linear(inside, x, product, 1)
        except KernelError:
            refused += 1
        release()
    return refused


def release() -> None:
    """Give the guarded pages back."""
    for memory in _kept:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        protect(address, len(memory), mmap.PROT_READ | mmap.PROT_WRITE)
    _kept.clear()


SHAPES = ((1, 1), (64, 64), (64, 256), (65, 65), (130, 333), (63, 320), (1, 500))


def main(name: str) -> None:
    if name == "touch":
        array = guarded(np.zeros(4, np.uint8), at_end=True, readonly=True)
        ctypes.string_at(array.ctypes.data, 5)
        return
    kernel = cpu.CpuKernel(name)
    make, tame = _random["random_packed"], _random["TAME"]
    for form in _random["FORMS"]:
        refused = 0
        for dtype in ELEMENT:
            for density in (0.0, 0.01, 0.5, 1.0):
                for seed, shape in enumerate(SHAPES):
                    print(name, form, dtype, density, shape, flush=True)
                    check(kernel, make(seed, *shape, dtype, form, density, tops=tame))
            for seed, shape in enumerate(((64, 64), (65, 65), (100, 320), (130, 70))):
                print(name, form, dtype, "hostile", shape, flush=True)
                matrix = make(seed, *shape, dtype, form, 0.5)
                refused += check_hostile(kernel, matrix, seed)
        assert refused > 0
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
