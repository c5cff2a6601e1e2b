"""The C++ module refuses what it cannot read even when nothing stands in front of it."""

from typing import Any

import numpy as np
import pytest

from tierd_kernels import _cpu, cpu
from tierd_layouts import tiles

native: Any = _cpu
NAMES = [kernel.name for kernel in cpu.supported_kernels()]


def packed() -> tuple[Any, Any, Any]:
    return tiles.encode(np.eye(128, dtype=np.uint16))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("argument", range(4))
def test_an_array_of_another_type_is_never_converted(name: str, argument: int) -> None:
    """Without noconvert() nanobind turns 2.7 into 2, and writes the result to a copy."""
    arrays: list[Any] = [*packed(), np.zeros((128, 128), np.uint16)]
    arrays[argument] = arrays[argument].astype(np.float32)
    with pytest.raises(TypeError):
        native.expand(*arrays, 2, 0, 1, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("argument", range(5))
def test_no_array_of_a_product_is_converted(name: str, argument: int) -> None:
    x, out = np.zeros((1, 128), np.uint16), np.zeros((1, 128), np.float32)
    arrays: list[Any] = [*packed(), x, out]
    arrays[argument] = arrays[argument].astype(np.float64)
    with pytest.raises(TypeError):
        native.linear(*arrays, False, 1, name)


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_is_not_contiguous_or_not_writable_is_refused(name: str) -> None:
    frozen = np.zeros((128, 128), np.uint16)
    frozen.flags.writeable = False
    for out in (np.zeros((128, 256), np.uint16)[:, ::2], frozen):
        with pytest.raises(TypeError):
            native.expand(*packed(), out, 2, 0, 1, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("rows", "cols", "tile_rows", "first"),
    [(128, 128, 3, 0), (128, 192, 2, 0), (128, 128, 2, 1), (128, 128, 2, 2**40), (100, 128, 3, 0)],
)
def test_sizes_that_do_not_fit_are_refused(
    name: str, rows: int, cols: int, tile_rows: int, first: int
) -> None:
    with pytest.raises(ValueError, match=r"tile rows|tiles need|rows and ends"):
        native.expand(*packed(), np.zeros((rows, cols), np.uint16), tile_rows, first, 1, name)


def test_an_unknown_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel is named 'mmx'"):
        native.expand(*packed(), np.zeros((128, 128), np.uint16), 2, 0, 1, "mmx")
