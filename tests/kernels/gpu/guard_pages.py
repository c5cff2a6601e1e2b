"""A program for test_guard_pages.py: interpreted kernels on arrays between forbidden pages.

The interpreter reads and writes the addresses that a kernel computes. Prints each case before it
runs, so that the last line names the one that died.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import runpy
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tierd_kernels import PackedMatrix, reference
from tierd_kernels.faults import NO_FAULT, new_faults
from tierd_kernels.geometry import ELEMENT
from tierd_kernels.gpu.expand import WAYS, expand
from tierd_kernels.torch_matrix import DTYPES, TorchMatrix, measured

HERE = Path(__file__).parent
_guard = runpy.run_path(str(HERE.parent / "guard_pages.py"))
guarded, release = _guard["guarded"], _guard["release"]
_random = runpy.run_path(str(HERE.parent / "random_matrices.py"))
random_packed, FORMS = _random["random_packed"], _random["FORMS"]


def inside(matrix: PackedMatrix, *, at_end: bool) -> TorchMatrix:
    """The matrix in arrays that touch a forbidden page with their last, or first, byte."""
    arrays: dict[str, Any] = {"bitmap": None}
    for name, array in matrix.arrays().items():
        octets = array.view(np.uint8).reshape(-1)
        arrays[name] = torch.from_numpy(guarded(octets, at_end=at_end, readonly=False))
    return TorchMatrix(
        matrix.codec, matrix.dtype, matrix.rows, matrix.cols, group=matrix.group, **arrays
    )


def run(matrix: PackedMatrix, way: Any, *, at_end: bool) -> tuple[int, Any]:
    """The fault and the bits that an expansion between forbidden pages leaves."""
    bits: Any = np.full((matrix.rows, matrix.cols), 7, ELEMENT[matrix.dtype])
    written = guarded(bits, at_end=at_end, readonly=False)
    out = torch.from_numpy(written).view(DTYPES[matrix.dtype])
    cell = new_faults("cpu")
    expand(measured(inside(matrix, at_end=at_end)), out, faults=cell, way=way)
    found = int(cell), written.copy()
    release()
    return found


def check(matrix: PackedMatrix, way: Any, *, at_end: bool) -> None:
    wanted: Any = np.empty((matrix.rows, matrix.cols), ELEMENT[matrix.dtype])
    reference.expand(matrix, wanted, 0, -(-matrix.rows // 64), 1)
    fault, bits = run(matrix, way, at_end=at_end)
    assert fault == NO_FAULT
    assert np.array_equal(bits, wanted)


def hostile(good: PackedMatrix, way: Any, seed: int) -> int:
    """Runs it with wrong bits where a kernel is led by them; returns how often that was a fault."""
    rng = np.random.default_rng(seed)
    faults = 0
    for name in good.arrays():
        if name == "scales":
            continue
        arrays: dict[str, Any] = {key: array.copy() for key, array in good.arrays().items()}
        octets = arrays[name].view(np.uint8)
        for _ in range(2):
            octets[rng.integers(octets.size)] ^= 1 << rng.integers(8)
        fault, _bits = run(replace(good, **arrays), way, at_end=bool(rng.integers(2)))
        faults += fault != NO_FAULT
    return faults


def main(what: str) -> None:
    if what == "touch":
        array = torch.from_numpy(guarded(np.zeros(64, np.uint8), at_end=True, readonly=False))
        wrong = TorchMatrix("int8", "BF16", 64, 64, None, array, array, scales=array, group=64)
        out = torch.empty((64, 64), dtype=torch.bfloat16)
        from tierd_kernels.gpu.expand import launch

        launch(wrong, out, new_faults("cpu"), 0, 1, WAYS[0])  # scales that are not checked
        return
    warnings.simplefilter("error")
    np.seterr(all="ignore")
    for form in FORMS:
        faults = 0
        for turn, (dtype, shape) in enumerate((("BF16", (64, 580)), ("F32", (3, 70)))):
            way = WAYS[turn]
            print(form, dtype, way, shape, flush=True)
            check(random_packed(turn, *shape, dtype, form, 0.9), way, at_end=turn == 0)
            print(form, dtype, way, "hostile", flush=True)
            faults += hostile(random_packed(turn, 64, 70, dtype, form, 0.5), way, turn)
        assert faults > 0
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
