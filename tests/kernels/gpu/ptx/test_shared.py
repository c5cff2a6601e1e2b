"""What two warps do at one byte of shared memory has a barrier between, or is an error."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.gpu.ptx.errors import Race, Undefined, WrongAddress
from tests.kernels.gpu.ptx.snippets import run

HEAD = ".extern .shared .align 16 .b8 smem[];"
MINE = "shl.b32 %r1, %r60, 2; mov.u32 %r2, smem; add.u32 %r3, %r1, %r2;"
"""%r3: a word for each thread."""
OTHERS = "xor.b32 %r4, %r1, 128; add.u32 %r4, %r4, %r2;"
"""%r4: that of a thread of the other warp."""
OUT = "ld.param.u64 %rd0, [k_0]; mad.wide.u32 %rd1, %r60, 4, %rd0;"


def exchange(*, barrier: str = "bar.sync 0;", last: str = "") -> np.ndarray:
    """Two warps read what the other one wrote."""
    out = np.zeros(64, np.uint32)
    body = f"""{MINE} {OTHERS} {OUT} st.shared.b32 [%r3], %r60; {barrier}
        ld.shared.b32 %r5, [%r4]; st.global.b32 [%rd1], %r5; {last} ret;"""
    run(body, [out], threads=64, shared_bytes=256, head=HEAD)
    return out


def test_behind_a_barrier_the_other_warp_s_numbers_are_read() -> None:
    np.testing.assert_array_equal(exchange(), np.arange(64) ^ 32)


def test_without_a_barrier_that_is_a_race() -> None:
    with pytest.raises(Race, match=r"ld\.shared.*warp 1 reads byte shared\+0, written by warp 0"):
        exchange(barrier="")


def test_a_write_where_another_warp_has_read_since_the_barrier_is_a_race() -> None:
    with pytest.raises(Race, match=r"warp 1 writes byte shared\+128, read by warp 0"):
        exchange(last="st.shared.b32 [%r3], %r60;")
    exchange(last="bar.sync 0; st.shared.b32 [%r3], %r60;")


def test_two_warps_that_write_one_place_are_a_race() -> None:
    with pytest.raises(Race, match="written by warp"):
        run(
            f"{MINE} and.b32 %r3, %r3, -129; st.shared.b32 [%r3], 1; ret;",
            threads=64,
            shared_bytes=256,
            head=HEAD,
        )


def test_bytes_that_nobody_wrote_are_not_read() -> None:
    with pytest.raises(Undefined, match=r"thread 0 reads byte shared\+0 .* that nobody wrote"):
        run(f"{MINE} ld.shared.b32 %r5, [%r3]; ret;", shared_bytes=256, head=HEAD)


def test_no_byte_outside_of_the_program_s_is_touched() -> None:
    with pytest.raises(WrongAddress, match=r"4 bytes at shared\+128 of 128"):
        run(f"{MINE} st.shared.b32 [%r3+4], 0; ret;", shared_bytes=128, head=HEAD)
    with pytest.raises(WrongAddress):
        run("mov.b32 %r3, 0; st.shared.b32 [%r3], 0; ret;", shared_bytes=128, head=HEAD)


def test_static_variables_lie_before_the_external_one() -> None:
    out = np.zeros(32, np.uint32)
    run(
        f"""{OUT} mov.u32 %r1, table; mov.u32 %r2, smem; sub.u32 %r3, %r2, %r1;
        st.shared.b32 [%r1+36], 5; st.global.b32 [%rd1], %r3; ret;""",
        [out],
        head=f"{HEAD} .shared .align 4 .b8 table[40];",
    )
    assert (out >= 40).all()


def within_a_warp(between: str, size: str = "b32") -> np.ndarray:
    """Lanes read what their neighbours wrote."""
    out = np.zeros(32, np.uint32)
    body = f"""{MINE} {OUT} xor.b32 %r4, %r3, 4; mov.u16 %rs1, 1;
        st.shared.b16 [%r3], %rs1; st.shared.b16 [%r3+2], %rs1;
        ld.shared.b32 %r6, [%r3]; {between}
        ld.shared.{size} %r5, [%r4]; st.global.b32 [%rd1], %r5; ret;"""
    run(body, [out], shared_bytes=128, head=HEAD)
    return out


def test_lanes_of_a_warp_meet_before_they_read_each_other_s_numbers() -> None:
    assert (within_a_warp("bar.warp.sync -1;") == 0x00010001).all()
    for between in ("", "shfl.sync.idx.b32 %r7, %r1, 0, 31, -1;"):
        for size in ("b32", "u16"):
            with pytest.raises(
                Race, match=r"thread 0 reads word shared\+4, written by another lane"
            ):
                within_a_warp(between, size)


def test_a_write_where_another_lane_has_read_is_a_race() -> None:
    write = "bar.warp.sync -1; ld.shared.b32 %r7, [%r4]; {} st.shared.u8 [%r3+1], 0;"
    within_a_warp(write.format("bar.warp.sync -1;") + "bar.warp.sync -1;")
    with pytest.raises(Race, match=r"writes word shared\+1, read by another lane"):
        within_a_warp(write.format(""))


def test_lanes_that_met_are_no_barrier_of_two_warps() -> None:
    with pytest.raises(Race, match="written by warp 0"):
        exchange(barrier="bar.warp.sync -1;")


# ---------------------------------------------------------------------------------- cp.async

COPY = """cp.async.ca.shared.global [%r3], [%rd1], 4; cp.async.commit_group;
    cp.async.ca.shared.global [%r3+128], [%rd1], 4, %r6; cp.async.commit_group;"""


def copied(wait: str, then: str, threads: int = 32) -> np.ndarray:
    """A word copied by the first group, and by the second one zeros for odd threads."""
    source, out = np.arange(100, 100 + threads, dtype=np.uint32), np.zeros(threads, np.uint32)
    body = f"""{MINE} {OUT} and.b32 %r6, %r60, 1; xor.b32 %r6, %r6, 1; shl.b32 %r6, %r6, 2;
        {COPY} {wait} {then}
        ld.param.u64 %rd2, [k_1]; mad.wide.u32 %rd3, %r60, 4, %rd2; st.global.b32 [%rd3], %r5;
        ret;"""
    run(body, [source, out], threads=threads, shared_bytes=256, head=HEAD)
    return out


def test_a_copy_is_there_when_it_was_waited_for() -> None:
    first = copied("cp.async.wait_group 1;", "ld.shared.b32 %r5, [%r3];")
    np.testing.assert_array_equal(first, np.arange(100, 132))
    for wait in ("cp.async.wait_group 0;", "cp.async.wait_all;"):
        second = copied(wait, "ld.shared.b32 %r5, [%r3+128];")
        np.testing.assert_array_equal(second, np.where(np.arange(32) % 2, 0, first))


@pytest.mark.parametrize(
    ("wait", "then"),
    [
        ("", "ld.shared.b32 %r5, [%r3];"),
        ("cp.async.wait_group 1;", "ld.shared.b32 %r5, [%r3+128];"),
        ("cp.async.wait_group 1;", "st.shared.b32 [%r3+128], 0; mov.b32 %r5, 0;"),
    ],
)
def test_a_copy_under_way_is_not_touched(wait: str, then: str) -> None:
    with pytest.raises((Race, Undefined), match=r"shared\+\d+ of shared memory"):
        copied(wait, then)


def test_another_warp_s_copy_is_there_behind_a_barrier_alone() -> None:
    other = "xor.b32 %r3, %r3, 128; ld.shared.b32 %r5, [%r3];"
    once = COPY.replace("[%r3+128]", "[%r3+256]")
    source = np.arange(64, dtype=np.uint32)
    for barrier in ("bar.sync 0;", ""):
        out = np.zeros(64, np.uint32)
        body = f"""{MINE} {OUT} mov.b32 %r6, 4; {once} cp.async.wait_all; {barrier} {other}
            ld.param.u64 %rd2, [k_1]; mad.wide.u32 %rd3, %r60, 4, %rd2;
            st.global.b32 [%rd3], %r5; ret;"""
        if barrier:
            run(body, [source, out], threads=64, shared_bytes=512, head=HEAD)
            np.testing.assert_array_equal(out, source ^ 32)
            continue
        with pytest.raises(Race, match="written by warp"):
            run(body, [source, out], threads=64, shared_bytes=512, head=HEAD)
