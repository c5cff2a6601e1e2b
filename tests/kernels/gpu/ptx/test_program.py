"""Threads that go different ways do what each of them would alone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.gpu.ptx.errors import Undefined, UnknownPtx
from tests.kernels.gpu.ptx.snippets import computed, run

NUMBERS = np.random.default_rng(5).integers(1, 200, 128).astype(np.uint32)


def steps(number: int) -> int:
    """Of Collatz's sequence."""
    count = 0
    while number != 1:
        number = number // 2 if number % 2 == 0 else 3 * number + 1
        count += 1
    return count


COLLATZ = """
    mov.b32 %r9, 0;
LOOP:
    setp.eq.u32 %p1, %r0, 1;
    @%p1 bra DONE;
    and.b32 %r1, %r0, 1;
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra ODD;
    shr.u32 %r0, %r0, 1;
    bra.uni NEXT;
ODD:
    mad.lo.u32 %r0, %r0, 3, 1;
NEXT:
    add.u32 %r9, %r9, 1;
    bra LOOP;
DONE:
"""


def test_every_thread_takes_its_own_way_through_a_loop() -> None:
    found = computed(COLLATZ, [NUMBERS], "%r9")
    assert found.tolist() == [steps(int(number)) for number in NUMBERS]


def test_threads_meet_again_behind_a_branch() -> None:
    """Or the shuffle would be an error."""
    line = f"{COLLATZ} shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;"
    wanted = np.array([steps(int(number)) for number in NUMBERS]).reshape(-1, 2)[:, ::-1]
    np.testing.assert_array_equal(computed(line, [NUMBERS], "%r9"), wanted.reshape(-1))


def test_a_register_that_some_threads_did_not_write_is_not_read_by_them() -> None:
    line = "setp.gt.u32 %p1, %r60, 40; @%p1 bra DONE; mov.b32 %r1, 1; DONE: mov.b32 %r9, %r1;"
    with pytest.raises(Undefined, match=r"'mov.b32 %r9, %r1': r1 was not written"):
        computed(line, [NUMBERS], "%r9")
    assert computed(line, [NUMBERS[:32]], "%r9").tolist() == [1] * 32


HALF = "setp.lt.u32 %p1, %r60, 16; @%p1 mov.b32 %r2, 5;"


@pytest.mark.parametrize("end", ["", "bra.uni NEXT; NEXT:"])
def test_what_only_a_guard_wrote_is_not_read_by_the_others(end: str) -> None:
    """In the same block and in the next one."""
    words = [NUMBERS[:32]]
    for reader in ("mov.b32 %r9, %r2;", "@!%p1 mov.b32 %r9, %r2;", "setp.eq.u32 %p2, %r2, 5;"):
        with pytest.raises(Undefined, match="r2 was not written"):
            computed(f"mov.b32 %r9, 7; {HALF} {end} {reader}", words, "%r9")
    found = computed(f"mov.b32 %r9, 7; {HALF} {end} @%p1 add.u32 %r9, %r2, 1;", words, "%r9")
    assert found.tolist() == [6] * 16 + [7] * 16
    both = f"{HALF} {end} @!%p1 mov.b32 %r2, 3; mov.b32 %r9, %r2;"
    assert computed(both, words, "%r9").tolist() == [5] * 16 + [3] * 16


def test_programs_know_their_place_in_the_grid() -> None:
    out = np.zeros(6, np.uint32)
    body = """ld.param.u64 %rd0, [k_0]; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x;
        mad.lo.u32 %r3, %r1, %r2, %r60; mad.wide.u32 %rd1, %r3, 4, %rd0;
        mov.u32 %r4, %nctaid.x; mad.lo.u32 %r4, %r4, 100, %r3; st.global.b32 [%rd1], %r4; ret;"""
    run(body, [out], threads=2, programs=3)
    assert out.tolist() == [300, 301, 302, 303, 304, 305]


def test_a_block_in_braces_has_names_of_its_own() -> None:
    line = """mov.b32 %r9, 0;
        { .reg .b32 x; mov.b32 x, 5; again: add.u32 %r9, %r9, x; setp.lt.u32 %p1, %r9, 10;
        @%p1 bra again; }
        { .reg .b32 x; mov.b32 x, 7; again: add.u32 %r9, %r9, x; setp.lt.u32 %p1, %r9, 20;
        @%p1 bra again; }"""
    assert computed(line, [NUMBERS[:32]], "%r9").tolist() == [24] * 32


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("setp.eq.u32 %p1, %r60, 3; @%p1 ret; bar.sync 0;", "waits for threads that have ended"),
        (
            "setp.eq.u32 %p1, %r60, 3; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:",
            "a warp waits at two barriers",
        ),
        ("A: bra A;", "more than 262144 blocks"),
    ],
)
def test_a_program_that_would_hang_is_an_error(line: str, why: str) -> None:
    with pytest.raises(Undefined, match=why):
        run(f"{line} ret;")


def test_a_barrier_of_some_threads_is_not_known() -> None:
    with pytest.raises(UnknownPtx, match="a barrier that is not 0, of all threads"):
        run("bar.sync 1, 64; ret;", threads=128)
