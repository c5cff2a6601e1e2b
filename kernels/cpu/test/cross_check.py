"""Compare the kernels of another processor, under an emulator, with the reference.

Usage: cross_check.py KERNEL PROGRAM...; the program is cross_check.cpp, its emulator before it.
`expand` must give the same bits, `linear` the same product within rounding, and both must refuse
what the reference refuses.
"""

import runpy
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tierd_kernels import KernelError, PackedMatrix, reference
from tierd_kernels.geometry import ELEMENT, TILE, tiles_over

TESTS = Path(__file__).parents[3] / "tests" / "kernels"
CODECS = ("raw", "exponent-packed", "int8", "int4")
SHAPES = ((1, 1), (64, 64), (65, 65), (130, 200), (63, 320))
DENSITIES = (0.0, 0.01, 0.5, 1.0)
TOKENS = (1, 2, 3, 7, 8)
MOST_ERROR = 320 * 2.0**-24
"""Of the sum of sizes: at most 320 additions, each rounds by half a unit."""

Case = tuple[PackedMatrix, Any]
"""(matrix, bits of x)"""


def cases() -> Iterator[Case]:
    """Yield every codec, form, dtype, density and shape, also with a bit flipped, and cut short."""
    random = runpy.run_path(str(TESTS / "random_matrices.py"))
    rng = np.random.default_rng(0)
    for form in random["FORMS"]:
        for dtype in ELEMENT:
            for seed, (rows, cols) in enumerate(SHAPES):
                for density in DENSITIES:
                    matrix = random["random_packed"](
                        seed, rows, cols, dtype, form, density, tops=random["TAME"]
                    )
                    tokens = int(rng.choice(TOKENS))
                    # Below one half in any dtype: no product overflows.
                    x: Any = rng.integers(0, 0x3800, (tokens, cols)).astype(ELEMENT[dtype])
                    yield matrix, x << 16 if dtype == "F32" else x
                    yield flipped(rng, matrix), x
                    yield replace(matrix, values=matrix.values[: -16 // matrix.values.itemsize]), x


def flipped(rng: np.random.Generator, matrix: PackedMatrix) -> PackedMatrix:
    """Return the matrix with a wrong bit in what leads a kernel: all but values and scales."""
    arrays: dict[str, Any] = {name: array.copy() for name, array in matrix.arrays().items()}
    led: list[Any] = [arrays[name] for name in ("bitmap", "offsets", "heads") if name in arrays]
    some = led[rng.integers(len(led))].view(np.uint8)
    some[rng.integers(some.size)] ^= 1 << rng.integers(8)
    return replace(matrix, **arrays)


def written(matrix: PackedMatrix, x: Any) -> bytes:
    """Return the case as cross_check.cpp reads it."""
    arrays = matrix.arrays()
    order = ("bitmap", "offsets", "values", "heads", "scales")
    parts = [arrays[name].tobytes() if name in arrays else b"" for name in order]
    parts.append(x.tobytes())
    tiles = matrix.group // TILE
    groups = -(-tiles_over(matrix.cols) // tiles) if tiles else 0
    header = struct.pack(
        "<8I6Q",
        CODECS.index(matrix.codec),
        list(ELEMENT).index(matrix.dtype),
        *(matrix.rows, matrix.cols, tiles, groups, len(x), matrix.masked),
        *map(len, parts),
    )
    return b"".join([header, *parts])


def difference(matrix: PackedMatrix, x: Any, results: bytes, at: int) -> tuple[str, int]:
    """Return what is wrong with a result, "" if nothing, and where the next one begins."""
    expanded: Any = np.empty((matrix.rows, matrix.cols), ELEMENT[matrix.dtype])
    expand_fault, linear_fault = at, at + 4 + expanded.nbytes
    end = linear_fault + 4 + 4 * len(x) * matrix.rows
    refused = [results[fault : fault + 4] != bytes(4) for fault in (expand_fault, linear_fault)]
    try:
        reference.expand(matrix, expanded, 0, tiles_over(matrix.rows), 1)
    except KernelError as error:
        return "" if all(refused) else f"not refused: {error}", end
    if any(refused):
        return f"refused: {refused}", end
    if results[expand_fault + 4 : linear_fault] != expanded.tobytes():
        return "expand gives other bits", end
    ours = np.frombuffer(results[linear_fault + 4 : end], np.float32).reshape(len(x), matrix.rows)
    numbers, weights = reference.decode(x, matrix.dtype), reference.weights(matrix)
    most = MOST_ERROR * (np.abs(numbers) @ np.abs(weights).T) + 2.0**-140
    # Flipped heads make infinities and NaNs.
    with np.errstate(over="ignore", invalid="ignore"):
        exact = (numbers @ weights.T).astype(np.float32)
        near = (np.abs(ours - exact) <= most) | ~np.isfinite(exact)
    return "" if near.all() else "linear is not within rounding", end


def main(kernel: str, program: list[str]) -> int:
    """Run all cases; return how many differ."""
    asked = list(cases())
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "cases"), Path(folder, "results")
        given.write_bytes(b"".join(written(*case) for case in asked))
        subprocess.run([*program, kernel, given, found], check=True)
        results = found.read_bytes()
    at = wrong = refused = 0
    for number, (matrix, x) in enumerate(asked):
        refused += results[at : at + 4] != bytes(4)
        what, at = difference(matrix, x, results, at)
        if what:
            wrong += 1
            print(
                f"case {number}: {matrix.codec} {matrix.dtype} {matrix.rows}x{matrix.cols}: {what}"
            )
    assert at == len(results)
    print(f"{kernel}: {len(asked)} cases, {refused} refused, {wrong} differ from the reference")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]) != 0)
