"""The encoder's module refuses what does not fit, even when nothing stands in front of it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tierd_kernels import _encode, dispatch, encode

native: Any = _encode
NAMES = encode.available()


def bits_of(rows: int = 130, cols: int = 200) -> Any:
    rng = np.random.default_rng(1)
    bits = (rng.standard_normal((rows, cols), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    bits[rng.random(bits.shape) < 0.5] = 0
    return bits


def arguments(call: str) -> list[Any]:
    """Return what encode.py gives to a native function, without the encoder's name."""
    bits = bits_of()
    raw = encode.encode_raw(bits, "BF16")
    packed = encode.encode_exponent(bits, "BF16", masked=True)
    levels = encode.quantise(bits, "BF16", codec="int8", group=64, masked=True)
    how = ["BF16", False, 64]
    return {
        "raw_structure": [bits, raw.bitmap, raw.offsets],
        "raw_values": [bits, raw.bitmap, raw.offsets, raw.values],
        "exponent_structure": [bits, packed.bitmap, packed.offsets, packed.heads],
        "exponent_values": [bits, packed.bitmap, packed.offsets, packed.heads, packed.values],
        "choose_scales": [bits, *how, levels.scales],
        "level_structure": [bits, *how, levels.scales, levels.bitmap, levels.offsets],
        "level_values": [
            bits,
            *how,
            levels.scales,
            levels.bitmap,
            levels.offsets,
            levels.values,
        ],
    }[call]


CALLS = (
    "raw_structure",
    "raw_values",
    "exponent_structure",
    "exponent_values",
    "choose_scales",
    "level_structure",
    "level_values",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", CALLS)
def test_an_array_of_another_type_is_never_converted(name: str, call: str) -> None:
    for place, argument in enumerate(arguments(call)):
        if not isinstance(argument, np.ndarray):
            continue
        changed = arguments(call)
        changed[place] = argument.astype(np.float32)
        with pytest.raises(TypeError):
            getattr(native, call)(*changed, name)
    with pytest.raises(TypeError):
        native.prune(bits_of().astype(np.float32), 0x7F80, 1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", CALLS)
def test_an_array_that_is_too_short_or_too_long_is_refused(name: str, call: str) -> None:
    getattr(native, call)(*arguments(call), name)
    for place, argument in enumerate(arguments(call)[1:], 1):
        if not isinstance(argument, np.ndarray):
            continue
        for other in (argument[:-1], argument[:0], np.append(argument, argument[-1:])):
            changed = arguments(call)
            changed[place] = other
            with pytest.raises(ValueError, match="entries, needs"):
                getattr(native, call)(*changed, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", ["raw_values", "exponent_values", "level_values"])
def test_a_structure_of_another_matrix_is_refused_before_a_run_is_passed(
    name: str, call: str
) -> None:
    """What the second pass may write follows from the first, not from a matrix that has changed."""
    changed = arguments(call)
    bitmap, offsets = (changed[1], changed[2]) if call != "level_values" else changed[5:7]
    bitmap[64] = ~np.uint64(0)
    bitmap[65:72] = ~np.uint64(0)
    with pytest.raises(ValueError, match=r"tile 1: the structure is not that of the matrix"):
        getattr(native, call)(*changed, name)
    changed = arguments(call)
    offsets = changed[2] if call != "level_values" else changed[6]
    offsets[2] = 0
    with pytest.raises(ValueError, match=r"tile 1: the structure is not that of the matrix"):
        getattr(native, call)(*changed, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change",
    [
        lambda head: head + (1 << 16),  # one escape more than there are
        lambda head: head & ~0xFF00 | 9 << 8,
        lambda head: head ^ 0x40,  # a window where hardly anything is
        lambda head: 0xFFFFFFFF,
    ],
)
def test_a_head_that_does_not_fit_is_refused(name: str, change: Callable[[int], int]) -> None:
    bits, bitmap, offsets, heads, values = arguments("exponent_values")
    heads[2] = change(int(heads[2]))
    with pytest.raises(ValueError, match=r"tile 2: the structure is not that of the matrix"):
        native.exponent_values(bits, bitmap, offsets, heads, values, name)


def test_rows_that_are_not_contiguous_are_refused() -> None:
    with pytest.raises(ValueError, match="are 2 apart, needs 1"):
        native.measure(bits_of()[:, ::2], "plain")
    with pytest.raises(ValueError, match="are 2 apart, needs 1"):
        native.prune(bits_of()[:, ::2], 0x7F80, 1)


def test_an_unknown_encoder_dtype_or_group_is_refused() -> None:
    with pytest.raises(ValueError, match="no encoder is named 'mmx'"):
        native.measure(bits_of(), "mmx")
    scales = np.zeros(1, np.uint16)
    for dtype in ("F32", "I16"):
        with pytest.raises(ValueError, match=f"dtype '{dtype}'"):
            native.choose_scales(bits_of(), dtype, True, 64, scales, "plain")
    for group in (0, 100):
        with pytest.raises(ValueError, match="positive multiple of 64"):
            native.choose_scales(bits_of(), "BF16", True, group, scales, "plain")


@pytest.mark.parametrize(
    ("kernel_in_use", "expected"), [("reference", "plain"), ("plain", "plain")]
)
def test_the_encoder_is_the_kernels_one_or_plain(
    monkeypatch: pytest.MonkeyPatch, kernel_in_use: str, expected: str
) -> None:
    monkeypatch.setattr(dispatch, "current", lambda: dispatch.kernels()[kernel_in_use])
    assert encode.encoder_name() == expected
