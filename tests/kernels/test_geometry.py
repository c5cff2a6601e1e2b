"""Arrays that do not fit are refused by name, before and after a kernel looks at their contents."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd_kernels import KernelError, PackedMatrix, expand, linear, reference
from tierd_kernels.geometry import ELEMENT

RAW = ("raw", True)
EXPONENT = ("exponent-packed", True)
INT8 = ("int8", True)
Change = Callable[[PackedMatrix], dict[str, Any]]


@pytest.fixture(scope="module")
def matrix_of(random_packed: Callable[..., PackedMatrix]) -> Callable[..., PackedMatrix]:
    """matrix_of(form, dtype): 130 rows and 200 columns, 12 tiles, in arrays of its own."""
    return lambda form=RAW, dtype="BF16": random_packed(0, 130, 200, dtype, form)


def changed(matrix: PackedMatrix, **elements: dict[int, int]) -> PackedMatrix:
    """The matrix with some elements of some arrays replaced."""
    arrays = {}
    for name, new in elements.items():
        arrays[name] = getattr(matrix, name).copy()
        for place, value in new.items():
            arrays[name][place] = value
    return replace(matrix, **arrays)


BAD: dict[str, tuple[tuple[str, bool], Change, str]] = {
    "unknown codec": (RAW, lambda m: {"codec": "zip"}, "codec 'zip' is not one of raw, exponent"),
    "unknown dtype": (RAW, lambda m: {"dtype": "I8"}, "dtype 'I8' is not one of BF16, F16, F32"),
    "negative shape": (RAW, lambda m: {"rows": -1}, r"shape \[-1, 200\] is not in 0..4294967231"),
    "too many rows": (RAW, lambda m: {"rows": 2**32}, r"shape \[4294967296, 200\] is not in 0.."),
    "other rows": (RAW, lambda m: {"rows": 200}, "bitmap has 768 words, 16 tiles"),
    "other columns": (RAW, lambda m: {"cols": 300}, "bitmap has 768 words, 15 tiles"),
    "bitmap too short": (
        RAW,
        lambda m: {"bitmap": m.arrays()["bitmap"][:-1]},
        "bitmap has 767 words, 12 tiles",
    ),
    "bitmap signed": (
        RAW,
        lambda m: {"bitmap": m.arrays()["bitmap"].view(np.int64)},
        "bitmap has dtype int64",
    ),
    "bitmap not an array": (
        RAW,
        lambda m: {"bitmap": m.arrays()["bitmap"].tolist()},
        "bitmap is a list",
    ),
    "bitmap strided": (
        RAW,
        lambda m: {"bitmap": np.repeat(m.arrays()["bitmap"], 2)[::2]},
        "bitmap .*not C-contiguous",
    ),
    "bitmap unaligned": (
        RAW,
        lambda m: {
            "bitmap": np.frombuffer(b"x" + m.arrays()["bitmap"].tobytes(), np.uint8)[1:].view("u8")
        },
        "bitmap does not start on",
    ),
    "raw without bitmap": (RAW, lambda m: {"bitmap": None}, "bitmap is missing, 12 tiles of 64"),
    "offsets too long": (
        RAW,
        lambda m: {"offsets": np.append(m.offsets, m.offsets[-1:])},
        "offsets has 14 entries",
    ),
    "offsets wide": (
        INT8,
        lambda m: {"offsets": m.offsets.astype(np.uint64)},
        "offsets has dtype uint64",
    ),
    "offsets begin late": (
        EXPONENT,
        lambda m: {"offsets": m.offsets + np.uint32(1)},
        "offsets begin at 1",
    ),
    "values cut": (RAW, lambda m: {"values": m.values[:-8]}, "offsets end at .* bytes, values has"),
    "values too long": (
        INT8,
        lambda m: {"values": np.append(m.values, m.values[:16])},
        "offsets end at .* bytes, values has",
    ),
    "values float": (
        RAW,
        lambda m: {"values": m.values.view(np.float16)},
        "values has dtype float16, uint16 is needed",
    ),
    "values wide": (
        EXPONENT,
        lambda m: {"values": m.values.view(np.uint16)},
        "values has dtype uint16, uint8 is needed",
    ),
    "values in rows": (
        RAW,
        lambda m: {"values": m.values.reshape(-1, 8)},
        "values has 2 dimensions",
    ),
    "no heads": (EXPONENT, lambda m: {"heads": None}, "heads is missing, 12 tiles need 12 entries"),
    "heads short": (
        EXPONENT,
        lambda m: {"heads": m.arrays()["heads"][:-1]},
        "heads has 11 entries, 12 tiles need 12",
    ),
    "heads signed": (
        EXPONENT,
        lambda m: {"heads": m.arrays()["heads"].view(np.int32)},
        "heads has dtype int32",
    ),
    "heads of another codec": (
        RAW,
        lambda m: {"heads": np.zeros(12, np.uint32)},
        "codec raw has no heads",
    ),
    "no scales": (INT8, lambda m: {"scales": None}, r"scales is missing, \[130, 200\] in groups"),
    "scales short": (
        INT8,
        lambda m: {"scales": m.arrays()["scales"][:-1]},
        "scales has 383 entries, .* in groups of 128 columns need 384",
    ),
    "scales float": (
        INT8,
        lambda m: {"scales": m.arrays()["scales"].view(np.float16)},
        "scales has dtype float16",
    ),
    "scales of another codec": (
        EXPONENT,
        lambda m: {"scales": np.zeros(384, np.uint16)},
        "codec exponent-packed has no scales",
    ),
    "no group": (INT8, lambda m: {"group": 0}, "group of 0 columns is not a positive multiple"),
    "odd group": (
        INT8,
        lambda m: {"group": 100},
        "group of 100 columns is not a positive multiple",
    ),
    "huge group": (
        INT8,
        lambda m: {"group": 2**40},
        "scales has 384 entries, .* in groups of 1099511627776 columns need 192",
    ),
    "another group": (INT8, lambda m: {"group": 64}, "scales has 384 entries, .* need 768"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_matrix_is_named(
    kernel: str, matrix_of: Callable[..., PackedMatrix], case: str
) -> None:
    form, change, text = BAD[case]
    matrix = matrix_of(form)
    matrix = replace(matrix, **change(matrix))
    with pytest.raises(KernelError, match=text):
        expand(matrix, np.empty((130, 200), np.uint16))
    with pytest.raises(KernelError, match=text):
        linear(matrix, np.zeros((1, 200), np.uint16), np.empty((1, 130), np.float32))


def test_a_wrong_output_is_named(kernel: str, matrix_of: Callable[..., PackedMatrix]) -> None:
    frozen = np.empty((130, 200), np.uint16)
    frozen.flags.writeable = False
    wrong: list[tuple[Any, str]] = [
        (np.empty((130, 200), np.uint32), "out has dtype uint32, uint16 is needed"),
        (np.empty((130, 200), np.float16), "out has dtype float16"),
        (np.empty((200, 130), np.uint16).T, "out .*not C-contiguous"),
        (np.empty(26000, np.uint16), "out has 1 dimensions"),
        (np.empty((130, 300), np.uint16), r"out has shape \[130, 300\], .* have \[130, 200\]"),
        (np.empty((131, 200), np.uint16), r"out has shape \[131, 200\], .* have \[130, 200\]"),
        (frozen, "out is read-only"),
    ]
    for out, text in wrong:
        with pytest.raises(KernelError, match=text):
            expand(matrix_of(), out)


def test_a_wrong_range_of_tile_rows_is_named(
    kernel: str, matrix_of: Callable[..., PackedMatrix]
) -> None:
    wrong = [
        ((0, 4), 130),
        ((2, 1), 0),
        ((-1, 1), 128),
        ((0, 2), 127),
        ((0, 3), 128),
        ((1, 3), 129),
        ((3, 3), 1),
    ]
    for tile_rows, rows in wrong:
        with pytest.raises(KernelError, match=r"tile rows"):
            expand(matrix_of(), np.empty((rows, 200), np.uint16), tile_rows=tile_rows)


def test_x_and_the_product_must_fit(kernel: str, matrix_of: Callable[..., PackedMatrix]) -> None:
    x, out = np.zeros((2, 200), np.uint16), np.zeros((2, 130), np.float32)
    wrong: list[tuple[Any, Any, str]] = [
        (x.view(np.float16), out, "x has dtype float16"),
        (x.astype(np.uint32), out, "x has dtype uint32, uint16 is needed"),
        (x, out.astype(np.float64), "out has dtype float64"),
        (x, out[:1], r"out has shape \[1, 130\], 2 tokens of a matrix of 130 rows need \[2, 130\]"),
        (x, out[:, :129].copy(), r"out has shape \[2, 129\]"),
        (np.zeros((2, 300), np.uint16), out, "x has 300 columns, the matrix has 200"),
    ]
    for an_x, an_out, text in wrong:
        with pytest.raises(KernelError, match=text):
            linear(matrix_of(), an_x, an_out)


# ---------------------------------------------------------------------------------------- contents


def empty(shape: tuple[int, int], element: Any) -> Any:
    return np.empty(shape, element)


def refused(matrix: PackedMatrix, text: str, threads: int = 1) -> None:
    element = ELEMENT[matrix.dtype]
    with pytest.raises(KernelError, match=text):
        expand(matrix, empty((130, 200), element), threads=threads)
    for tokens in (1, 3):
        x, out = empty((tokens, 200), element), np.empty((tokens, 130), np.float32)
        with pytest.raises(KernelError, match=text):
            linear(matrix, x, out, threads=threads)


@pytest.mark.parametrize("tile", [0, 5, 11])
def test_offsets_that_do_not_fit_are_refused(
    kernel: str, matrix_of: Callable[..., PackedMatrix], form: tuple[str, bool], tile: int
) -> None:
    matrix = matrix_of(form)
    begin = int(matrix.offsets[tile])
    end = int(matrix.offsets[tile + 1])
    if tile < 11:
        for wrong in {begin - 1, begin, begin + 1, end - 1, end + 1} - {-1, end}:
            ends = changed(matrix, offsets={tile + 1: wrong})
            refused(ends, rf"tile {tile}\b.*(do not fit|descend)")
    if tile > 0:
        begins = changed(matrix, offsets={tile: begin + 1})
        refused(begins, rf"tile {tile - 1}\b.*do not fit")


def test_a_run_beyond_the_values_is_refused(
    kernel: str, matrix_of: Callable[..., PackedMatrix], form: tuple[str, bool]
) -> None:
    matrix = matrix_of(form)
    past = {tile: 2**32 - 1 for tile in range(5, 12)}
    refused(changed(matrix, offsets=past), r"tile 4\b.*pass the end of values")


MASKED = [RAW, EXPONENT, INT8, ("int4", True)]


@pytest.mark.parametrize("form", MASKED)
def test_a_bitmap_with_more_bits_than_values_is_refused(
    kernel: str, matrix_of: Callable[..., PackedMatrix], form: tuple[str, bool]
) -> None:
    matrix = matrix_of(form)
    half = next(t for t in range(12) if 500 < np.bitwise_count(words_of(matrix, t)).sum() < 4000)
    full = dict.fromkeys(range(64 * half, 64 * half + 63), 2**64 - 1)
    if half // 4 == 2:
        full = dict.fromkeys(range(64 * half, 64 * half + 2), 2**64 - 1)
    refused(changed(matrix, bitmap=full), rf"tile {half}\b.*(do not fit|bits outside)")


def words_of(matrix: PackedMatrix, tile: int) -> Any:
    assert matrix.bitmap is not None
    return matrix.bitmap[64 * tile : 64 * (tile + 1)]


@pytest.mark.parametrize("form", MASKED)
@pytest.mark.parametrize(("tile", "row", "bit"), [(3, 0, 8), (11, 0, 63), (8, 2, 0), (10, 63, 5)])
def test_a_bit_outside_the_matrix_is_refused(
    kernel: str,
    matrix_of: Callable[..., PackedMatrix],
    form: tuple[str, bool],
    tile: int,
    row: int,
    bit: int,
) -> None:
    matrix = matrix_of(form)
    word = int(words_of(matrix, tile)[row]) | 1 << bit
    refused(changed(matrix, bitmap={tile * 64 + row: word}), rf"tile {tile}\b.*bits outside")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("masked", [True, False])
def test_a_head_that_cannot_be_is_refused(
    kernel: str, matrix_of: Callable[..., PackedMatrix], dtype: str, masked: bool
) -> None:
    matrix = matrix_of(("exponent-packed", masked), dtype)
    too_many_planes = [9 << 8, 32 << 8, 255 << 8]
    window_past_255 = [255 | 1 << 8, 1 | 8 << 8]
    more_escapes_than_elements = [513 << 16, 4097 << 16, 65535 << 16]
    for head in too_many_planes + window_past_255 + more_escapes_than_elements + [2**32 - 1]:
        refused(changed(matrix, heads={7: head}), r"tile 7\b.*head .*cannot be")


def test_the_head_of_an_empty_tile_is_zero(kernel: str, pack: Callable[..., PackedMatrix]) -> None:
    bits = np.zeros((130, 200), np.uint16)
    matrix = pack(bits, "BF16", EXPONENT)
    out = np.ones_like(bits)
    expand(matrix, out)
    assert not out.any()
    for head in (1, 1 << 8, 1 << 16):
        refused(changed(matrix, heads={7: head}), r"tile 7\b.*head .*cannot be")


@pytest.mark.parametrize("escapes", [0, 1, 100])
@pytest.mark.parametrize("planes", [0, 1, 2, 3, 8])
def test_a_head_that_does_not_fit_its_record_is_refused(
    kernel: str, with_escapes: Callable[..., PackedMatrix], planes: int, escapes: int
) -> None:
    matrix = with_escapes(planes, range(escapes))
    for other in {0, 1, 2, 3, 8} - {planes}:
        refused(changed(matrix, heads={0: other << 8 | escapes << 16}), "tile 0.*do not fit")
    for more in (escapes + 8, escapes - 8):
        if more >= 0:
            refused(changed(matrix, heads={0: planes << 8 | more << 16}), "tile 0.*do not fit")


@pytest.fixture(scope="module")
def with_escapes() -> Callable[..., PackedMatrix]:
    """with_escapes(planes, ordinals, zero): one dense-form BF16 tile row; escapes of tile 0."""

    def make(planes: int, ordinals: Any, zero: int = 0, top: int = 200) -> PackedMatrix:
        entries = [i | top << 16 | zero << 24 for i in ordinals]
        records = []
        for tile in range(12):
            count = min(64, 130 - tile // 4 * 64) * min(64, 200 - tile % 4 * 64)
            record = bytes(-(-count // 8) * 8 + planes * -(-count // 64) * 8 * (tile == 0))
            record += np.array(entries if tile == 0 else [], "<u4").tobytes()
            records.append(record + bytes(-len(record) % 16))
        ends = np.cumsum([0, *(len(record) // 16 for record in records)]).astype(np.uint32)
        heads = np.zeros(12, np.uint32)
        heads[0] = planes << 8 | len(entries) << 16
        values = np.frombuffer(b"".join(records), np.uint8)
        return PackedMatrix("exponent-packed", "BF16", 130, 200, None, ends, values, heads=heads)

    return make


@pytest.mark.parametrize("planes", [0, 2])
@pytest.mark.parametrize(
    ("ordinals", "zero"),
    [([4096], 0), ([65535], 0), ([5, 5], 0), ([6, 5], 0), ([1, 4000, 4095, 4096], 0), ([5], 1)],
)
def test_escapes_that_do_not_ascend_within_the_tile_are_refused(
    kernel: str,
    with_escapes: Callable[..., PackedMatrix],
    planes: int,
    ordinals: list[int],
    zero: int,
) -> None:
    refused(with_escapes(planes, ordinals, zero), r"tile 0\b.*escapes do not ascend")


def test_an_escape_is_the_top_byte_whatever_the_code_says(
    kernel: str, with_escapes: Callable[..., PackedMatrix]
) -> None:
    """Its code should be 0; then no reader may depend on how another one adds them up."""
    matrix = with_escapes(2, [0, 5, 4095], top=201)
    planes = dict.fromkeys(range(4096, 4096 + 1024), 0xFF)
    out = np.empty((130, 200), np.uint16)
    expand(changed(matrix, values=planes), out)
    tile = out[:64, :64].reshape(-1)
    assert set(tile[[0, 5, 4095]]) == {201 << 7}
    assert set(np.delete(tile, [0, 5, 4095])) == {3 << 7}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_first_of_several_faults_is_named_whatever_the_threads(
    kernel: str, matrix_of: Callable[..., PackedMatrix], threads: int
) -> None:
    bits = {tile * 64 + 63: 2**64 - 1 for tile in (11, 9, 3)}
    refused(changed(matrix_of(), bitmap=bits), r"tile 3\b", threads)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["BF16", "F16", "F32"]))
def test_flipped_bits_give_what_the_reference_makes_of_them_never_a_crash(
    native_kernel: str,
    matrix_of: Callable[..., PackedMatrix],
    form: tuple[str, bool],
    data: st.DataObject,
    dtype: str,
) -> None:
    matrix = matrix_of(form, dtype)
    copies: dict[str, Any] = {name: array.copy() for name, array in matrix.arrays().items()}
    matrix = replace(matrix, **copies)
    for _ in range(data.draw(st.integers(1, 4))):
        array = matrix.arrays()[data.draw(st.sampled_from(sorted(matrix.arrays())))]
        place = data.draw(st.integers(0, array.size - 1))
        array[place] ^= array.dtype.type(1 << data.draw(st.integers(0, array.itemsize * 8 - 1)))
    element = ELEMENT[dtype]
    out, wanted = empty((130, 200), element), empty((130, 200), element)
    x, y = empty((2, 200), element), np.empty((2, 130), np.float32)
    try:
        if matrix.offsets[0] != 0 or int(matrix.offsets[-1]) * 16 != matrix.values.nbytes:
            raise KernelError("refused by its sizes")
        reference.expand(matrix, wanted, 0, 3, 1)
    except KernelError:
        with pytest.raises(KernelError):
            expand(matrix, out, threads=2)
        with pytest.raises(KernelError):
            linear(matrix, x, y, threads=2)
        return
    expand(matrix, out, threads=2)
    linear(matrix, x, y, threads=2)
    # A scale that is negative or not finite breaks the format: any value, but no crash.
    if matrix.scales is None or (matrix.scales < 0x7F80).all():
        np.testing.assert_array_equal(out, wanted)
