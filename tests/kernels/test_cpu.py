"""The C++ module refuses what it cannot read even when nothing stands in front of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tierd_kernels import PackedMatrix, _cpu, cpu

native: Any = _cpu
NAMES = [kernel.name for kernel in cpu.supported_kernels()]
Make = Callable[..., PackedMatrix]
OUT = {"out": np.zeros((128, 256), np.uint16), "first": 0}
PRODUCT = {"x": np.zeros((1, 256), np.uint16), "out": np.zeros((1, 128), np.float32)}


def arguments(matrix: PackedMatrix, name: str, **others: Any) -> dict[str, Any]:
    """What `tierd_kernels.cpu` passes, by name."""
    fields = {name: getattr(matrix, name) for name in PackedMatrix.__dataclass_fields__}
    return fields | {"threads": 1, "kernel": name, "values": matrix.values.view(np.uint8)} | others


@pytest.fixture(scope="module")
def matrix_of(random_packed: Make) -> Callable[..., PackedMatrix]:
    """matrix_of(codec): 128 rows, 256 columns, 8 tiles, BF16, masked."""
    return lambda codec="raw": random_packed(0, 128, 256, "BF16", (codec, True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("codec", "argument"),
    [
        ("raw", "bitmap"),
        ("raw", "offsets"),
        ("raw", "values"),
        ("exponent-packed", "heads"),
        ("int8", "scales"),
        ("raw", "x"),
        ("raw", "out"),
    ],
)
@pytest.mark.parametrize("other", [np.float32, np.int64, np.int8])
def test_an_array_of_another_type_is_never_converted(
    name: str, matrix_of: Make, codec: str, argument: str, other: type[np.generic]
) -> None:
    """Without noconvert() nanobind turns 2.7 into 2, and writes the result to a copy."""
    for function, more in ((native.expand, OUT), (native.linear, PRODUCT)):
        given = arguments(matrix_of(codec), name, **more)
        if argument not in given or (argument == "out" and given["out"].dtype == other):
            continue
        given[argument] = given[argument].astype(other)
        with pytest.raises(TypeError):
            function(**given)


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_is_not_contiguous_or_not_writable_is_refused(
    name: str, matrix_of: Make
) -> None:
    frozen = np.zeros((128, 256), np.uint16)
    frozen.flags.writeable = False
    for out in (np.zeros((128, 512), np.uint16)[:, ::2], frozen):
        with pytest.raises(TypeError):
            native.expand(**arguments(matrix_of(), name, out=out, first=0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "first"),
    [
        ((129, 256), 0),
        ((128, 192), 0),
        ((128, 256), 1),
        ((128, 256), 2**40),
        ((128, 256), 2**58),
        ((100, 256), 0),
        ((64, 256), 2),
        ((0, 256), 3),
    ],
)
def test_an_output_that_does_not_fit_is_refused(
    name: str, matrix_of: Make, shape: tuple[int, int], first: int
) -> None:
    out = np.zeros(shape, np.uint16)
    with pytest.raises(ValueError, match=r"out has .* the matrix has 128 and 256"):
        native.expand(**arguments(matrix_of(), name, out=out, first=first))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tokens", "cols", "out_tokens", "rows"),
    [(2, 256, 1, 128), (1, 256, 2, 128), (1, 255, 1, 128), (1, 256, 1, 129)],
)
def test_a_product_that_does_not_fit_is_refused(
    name: str, matrix_of: Make, tokens: int, cols: int, out_tokens: int, rows: int
) -> None:
    x, out = np.zeros((tokens, cols), np.uint16), np.zeros((out_tokens, rows), np.float32)
    with pytest.raises(ValueError, match=r"x has .* the matrix has 128 rows and 256 columns"):
        native.linear(**arguments(matrix_of(), name, x=x, out=out))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("codec", "changes", "text"),
    [
        ("raw", {"codec": "zip"}, "codec 'zip' is unknown"),
        ("raw", {"dtype": "I8"}, "dtype 'I8' is unknown"),
        ("raw", {"dtype": "F32"}, "has 2-byte elements, the matrix 4"),
        ("raw", {"bitmap": None}, "bitmap is missing"),
        ("exponent-packed", {"heads": None}, "heads is missing"),
        ("int4", {"scales": None}, "scales is missing"),
        ("int4", {"group": 0}, "group 0 is not a positive multiple of 64"),
        ("int4", {"group": 96}, "group 96 is not a positive multiple of 64"),
        ("int4", {"group": 2**33}, "8589934592 columns of a group are more than"),
        ("int4", {"group": 64}, "scales has 256 entries, 2 tile rows of 4 groups need 512"),
        ("raw", {"rows": 2**32}, "4294967296 rows are more than"),
        ("raw", {"rows": 192}, "bitmap has 512 entries, 12 tiles need 768"),
        ("raw", {"cols": 300}, "bitmap has 512 entries, 10 tiles need 640"),
        ("int8", {"bitmap": None, "rows": 64}, "offsets has 9 entries, 4 tiles need 5"),
        ("exponent-packed", {"heads": np.zeros(9, np.uint32)}, "heads has 9 entries"),
        ("raw", {"kernel": "mmx"}, "no kernel is named 'mmx'"),
    ],
)
def test_a_matrix_that_cannot_be_is_refused(
    name: str, matrix_of: Make, codec: str, changes: dict[str, Any], text: str
) -> None:
    for function, more in ((native.expand, OUT), (native.linear, PRODUCT)):
        with pytest.raises(ValueError, match=text):
            function(**arguments(matrix_of(codec), name, **more) | changes)
