"""What instructions compute is what the PTX manual says, written here in plain Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.gpu.ptx.errors import Undefined, UnknownPtx
from tests.kernels.gpu.ptx.snippets import computed

M32: Final = 0xFFFFFFFF
M64: Final = 0xFFFFFFFFFFFFFFFF
LONGS = st.one_of(
    st.integers(0, M64), st.sampled_from([0, 1, 63, 64, 65, (1 << 63) - 1, 1 << 63, M64])
)


def numbers(count: int, bits: int) -> list[Any]:
    """256 tuples of `count` numbers: any, small ones, and those at the ends of a range."""
    rng = np.random.default_rng(bits)
    shifts = rng.integers(0, bits, (256, count), np.uint64)
    found = rng.integers(0, M64, (256, count), np.uint64, endpoint=True) >> shifts
    special = [0, 1, 31, 32, 33, 63, 64, 65, (1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1]
    chosen = rng.random(found.shape) < 0.3
    found[chosen] = rng.choice(np.array(special, np.uint64), int(chosen.sum()))
    return list((found & np.uint64((1 << bits) - 1)).tolist())


def signed(number: int, bits: int = 32) -> int:
    return number - (1 << bits) if number >> bits - 1 else number


def byte(number: int, place: int) -> int:
    return number >> 8 * place & 255


def cut(a: int, b: int) -> int:
    """The quotient as C has it."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def permuted(a: int, b: int, selector: int) -> int:
    both, found = a | b << 32, 0
    for i in range(4):
        digit = selector >> 4 * i & 15
        octet = byte(both, digit & 7)
        if digit & 8:
            octet = 255 if octet & 128 else 0
        found |= octet << 8 * i
    return found


def bit_field(a: int, first: int, count: int, *, sign: bool) -> int:
    first, count = first & 255, count & 255
    highest = a >> min(first + count - 1, 31) & 1 if sign and count else 0
    bits = (a >> i & 1 if i <= 31 else highest for i in range(first, first + min(count, 32)))
    found = sum(bit << i for i, bit in enumerate(bits))
    return found | (sum(1 << i for i in range(min(count, 32), 32)) if highest else 0)


def inserted(piece: int, base: int, first: int, count: int) -> int:
    first, count = first & 255, count & 255
    for i in range(count):
        if first + i < 32:
            base = base & ~(1 << first + i) | (piece >> i & 1 if i < 32 else 0) << first + i
    return base


def looked_up(a: int, b: int, c: int, table: int) -> int:
    return sum(
        (table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)) & 1) << i
        for i in range(32)
    )


Spec = Callable[..., int]
WORD_SPECS: Final[dict[str, Spec]] = {
    "add.s32 %r9, %r0, %r1": lambda a, b, c: a + b,
    "sub.u32 %r9, %r0, %r1": lambda a, b, c: a - b,
    "mul.lo.s32 %r9, %r0, %r1": lambda a, b, c: a * b,
    "mul.hi.u32 %r9, %r0, %r1": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %r9, %r0, %r1": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.lo.s32 %r9, %r0, %r1, %r2": lambda a, b, c: a * b + c,
    "neg.s32 %r9, %r0": lambda a, b, c: -a,
    "min.s32 %r9, %r0, %r1": lambda a, b, c: min(signed(a), signed(b)),
    "max.s32 %r9, %r0, -7": lambda a, b, c: max(signed(a), -7),
    "min.u32 %r9, %r0, %r1": lambda a, b, c: min(a, b),
    "and.b32 %r9, %r0, %r1": lambda a, b, c: a & b,
    "xor.b32 %r9, %r0, 0x0F0F0F0F": lambda a, b, c: a ^ 0x0F0F0F0F,
    "not.b32 %r9, %r0": lambda a, b, c: ~a,
    "shl.b32 %r9, %r0, %r1": lambda a, b, c: a << min(b, 32),
    "shr.u32 %r9, %r0, %r1": lambda a, b, c: a >> min(b, 32),
    "shr.s32 %r9, %r0, %r1": lambda a, b, c: signed(a) >> min(b, 32),
    "shf.l.wrap.b32 %r9, %r0, %r1, %r2": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.wrap.b32 %r9, %r0, %r1, %r2": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "shf.l.clamp.b32 %r9, %r0, %r1, %r2": lambda a, b, c: (b << 32 | a) << min(c, 32) >> 32,
    "shf.r.clamp.b32 %r9, %r0, %r1, %r2": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32 %r9, %r0, %r1, %r2": lambda a, b, c: bit_field(a, b, c, sign=False),
    "bfe.s32 %r9, %r0, %r1, %r2": lambda a, b, c: bit_field(a, b, c, sign=True),
    "bfe.s32 %r9, %r0, 4, 1": lambda a, b, c: -(a >> 4 & 1),
    "bfi.b32 %r9, %r0, %r1, %r2, 5": lambda a, b, c: inserted(a, b, c, 5),
    "prmt.b32 %r9, %r0, %r1, %r2": permuted,
    "prmt.b32 %r9, %r0, %r1, 0x7362": lambda a, b, c: permuted(a, b, 0x7362),
    "lop3.b32 %r9, %r0, %r1, %r2, 0xD8": lambda a, b, c: looked_up(a, b, c, 0xD8),
    "lop3.b32 %r9, %r0, %r1, 0x01010101, 0xEA": lambda a, b, c: looked_up(a, b, 0x01010101, 0xEA),
    "dp4a.u32.u32 %r9, %r0, %r1, %r2": lambda a, b, c: (
        c + sum(byte(a, i) * byte(b, i) for i in range(4))
    ),
    "dp4a.s32.u32 %r9, %r0, %r1, %r2": lambda a, b, c: (
        c + sum(signed(byte(a, i), 8) * byte(b, i) for i in range(4))
    ),
    "dp2a.lo.u32.u32 %r9, %r0, %r1, %r2": lambda a, b, c: (
        c + sum((a >> 16 * i & 0xFFFF) * byte(b, i) for i in range(2))
    ),
    "dp2a.hi.u32.u32 %r9, %r0, %r1, %r2": lambda a, b, c: (
        c + sum((a >> 16 * i & 0xFFFF) * byte(b, i + 2) for i in range(2))
    ),
    "popc.b32 %r9, %r0": lambda a, b, c: a.bit_count(),
    "clz.b32 %r9, %r0": lambda a, b, c: 32 - a.bit_length(),
    "brev.b32 %r9, %r0": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "mov.b32 {%rs8, %rs9}, %r0; mov.b32 %r9, {%rs9, %rs8}": lambda a, b, c: a >> 16 | a << 16,
    "cvt.u32.u16 %r9, %rs9": lambda a, b, c: 0x8001,
    "cvt.s32.s16 %r9, %rs9": lambda a, b, c: -0x7FFF,
    "cvt.s32.s8 %r9, %r0": lambda a, b, c: signed(a & 255, 8),
    "setp.lt.s32 %p1, %r0, %r1; selp.b32 %r9, %r0, %r2, %p1": lambda a, b, c: (
        a if signed(a) < signed(b) else c
    ),
    "setp.gt.u32 %p1, %r0, %r1; @%p1 add.s32 %r9, %r9, 1": lambda a, b, c: 7 + (a > b),
    "setp.le.u32 %p1, %r0, %r1; @!%p1 mov.b32 %r9, %r2": lambda a, b, c: 7 if a <= b else c,
    "setp.ne.b32 %p1, %r0, %r1; setp.ge.and.s32 %p2, %r0, %r2, %p1; selp.b32 %r9, -1, 0, %p2": (
        lambda a, b, c: -1 if a != b and signed(a) >= signed(c) else 0
    ),
}
LONG_SPECS: Final[dict[str, Spec]] = {
    "mul.wide.u32 %rd9, %r3, %r4": lambda a, b: (a & M32) * (b & M32),
    "mad.wide.s32 %rd9, %r3, %r4, %rd0": lambda a, b: signed(a & M32) * signed(b & M32) + a,
    "mul.lo.s64 %rd9, %rd0, %rd1": lambda a, b: a * b,
    "mul.hi.u64 %rd9, %rd0, %rd1": lambda a, b: a * b >> 64,
    "shl.b64 %rd9, %rd0, %r4": lambda a, b: a << min(b & M32, 64),
    "shr.s64 %rd9, %rd0, %r4": lambda a, b: signed(a, 64) >> min(b & M32, 64),
    "min.s64 %rd9, %rd0, 64": lambda a, b: min(signed(a, 64), 64),
    "cvt.s64.s32 %rd9, %r3": lambda a, b: signed(a & M32),
    "cvt.u64.u32 %rd9, %r3": lambda a, b: a & M32,
    "setp.lt.u64 %p1, %rd0, %rd1; selp.b64 %rd9, %rd0, %rd1, %p1": min,
}


@pytest.mark.parametrize("instruction", WORD_SPECS)
def test_words_are_those_of_the_manual(instruction: str) -> None:
    examples = numbers(3, 32)
    sources = np.array(examples, np.uint32).T.copy()
    before = "mov.b32 %r9, 7; mov.u16 %rs9, 0x8001;"
    found = computed(f"{before} {instruction};", list(sources), "%r9")
    wanted = [WORD_SPECS[instruction](*each) & M32 for each in examples]
    np.testing.assert_array_equal(found, np.array(wanted, np.uint32))


@pytest.mark.parametrize("instruction", LONG_SPECS)
def test_double_words_are_those_of_the_manual(instruction: str) -> None:
    examples = numbers(2, 64)
    sources = np.array(examples, np.uint64).T.copy()
    before = "cvt.u32.u64 %r3, %rd0; cvt.u32.u64 %r4, %rd1;"
    found = computed(f"{before} {instruction};", list(sources), "%rd9")
    wanted = [LONG_SPECS[instruction](*each) & M64 for each in examples]
    np.testing.assert_array_equal(found, np.array(wanted, np.uint64))


@settings(max_examples=30, deadline=None)
@given(a=LONGS, b=LONGS.filter(bool))
def test_quotients_are_cut_off(a: int, b: int) -> None:
    sources = [np.array([a], np.uint64), np.array([b], np.uint64)]
    wide = cut(signed(a, 64), signed(b, 64))
    assert int(computed("div.s64 %rd9, %rd0, %rd1;", sources, "%rd9")[0]) == wide & M64
    rest = signed(a, 64) - wide * signed(b, 64)
    assert int(computed("rem.s64 %rd9, %rd0, %rd1;", sources, "%rd9")[0]) == rest & M64


def test_a_division_by_zero_is_an_error_that_names_the_instruction() -> None:
    words = [np.ones(2, np.uint32), np.array([1, 0], np.uint32)]
    with pytest.raises(Undefined, match=r"div\.u32 %r9, %r0, %r1.*by zero"):
        computed("div.u32 %r9, %r0, %r1;", words, "%r9")


# ----------------------------------------------------------------------------------- not known


@pytest.mark.parametrize(
    "instruction",
    ["prmt.b32.f4e %r9, %r0, %r0, 1", "add.sat.s32 %r9, %r0, %r0", "sin.approx.f32 %r9, %r0"],
)
def test_what_is_not_known_is_an_error_that_quotes_it(instruction: str) -> None:
    with pytest.raises(UnknownPtx, match=instruction.split(" ")[0]):
        computed(f"{instruction};", [np.zeros(1, np.uint32)], "%r9")


def test_a_register_of_another_width_is_an_error() -> None:
    with pytest.raises(UnknownPtx, match="register %r0 as u64"):
        computed("add.u64 %rd9, %r0, 1;", [np.zeros(1, np.uint32)], "%rd9")
