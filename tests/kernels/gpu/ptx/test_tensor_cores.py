"""Products of matrices whose elements lie where the tables of the PTX manual say, one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.gpu.ptx.errors import Race, Undefined
from tests.kernels.gpu.ptx.races import BASE
from tests.kernels.gpu.ptx.snippets import run

HEAD = ".extern .shared .align 128 .b8 smem[];"
RNG = np.random.default_rng(7)


def halves(shape: tuple[int, ...], dtype: str) -> tuple[Any, Any]:
    """Numbers, and their bits."""
    numbers = RNG.integers(-8, 9, shape).astype(np.float32) / 4
    bits = numbers.view(np.uint32) >> 16 if dtype == "bf16" else numbers.astype("f2").view("u2")
    return numbers, bits.astype(np.uint16)


def packed(low: Any, high: Any) -> int:
    return int(low) | int(high) << 16


def fragment_a(bits: Any, lane: int) -> list[int]:
    """a0,a1 .. a6,a7 of m16n8k16, as the manual counts them."""
    group, within = lane // 4, lane % 4
    rows = [group, group + 8, group, group + 8]
    columns = [within * 2, within * 2, within * 2 + 8, within * 2 + 8]
    return [packed(bits[r, c], bits[r, c + 1]) for r, c in zip(rows, columns, strict=True)]


def sum_places(lane: int, registers: int) -> list[tuple[int, int]]:
    group, within = lane // 4, lane % 4
    return [(group + 8 * (i % 4 // 2), within * 2 + i % 2 + 8 * (i // 4)) for i in range(registers)]


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_a_product_of_a_warp_has_its_elements_where_the_manual_says(dtype: str) -> None:
    a, a_bits = halves((16, 16), dtype)
    b, b_bits = halves((16, 8), dtype)
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    words = np.zeros((32, 10), np.uint32)
    for lane in range(32):
        k, n = lane % 4 * 2, lane // 4
        right = [packed(b_bits[k + i, n], b_bits[k + i + 1, n]) for i in (0, 8)]
        before = [c[place].view(np.uint32) for place in sum_places(lane, 4)]
        words[lane] = [*fragment_a(a_bits, lane), *right, *before]
    out = np.zeros((32, 4), np.float32)
    loads = "\n".join(f"ld.global.b32 %r{i}, [%rd1+{4 * i}];" for i in range(10))
    body = f"""ld.param.u64 %rd0, [k_0]; mad.wide.u32 %rd1, %r60, 40, %rd0; {loads}
        mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{%r10, %r11, %r12, %r13}},
            {{%r0, %r1, %r2, %r3}}, {{%r4, %r5}}, {{%r6, %r7, %r8, %r9}};
        ld.param.u64 %rd2, [k_1]; mad.wide.u32 %rd3, %r60, 16, %rd2;
        st.global.v4.b32 [%rd3], {{%r10, %r11, %r12, %r13}}; ret;"""
    run(body, [words, out])
    wanted = a @ b + c
    for lane in range(32):
        np.testing.assert_allclose(
            out[lane], [wanted[place] for place in sum_places(lane, 4)], rtol=1e-6
        )


@pytest.mark.parametrize("turned", [False, True])
def test_matrices_are_loaded_and_stored_by_rows_that_lanes_point_at(turned: bool) -> None:
    """What ldmatrix brings, stmatrix of the same kind puts back."""
    matrices = RNG.integers(0, 1 << 16, (4, 8, 8)).astype(np.uint16)
    loaded, stored = np.zeros((32, 4), np.uint32), np.zeros((4, 8, 8), np.uint16)
    trans = ".trans" if turned else ""
    body = f"""shl.b32 %r1, %r60, 4; mov.u32 %r2, smem; add.u32 %r3, %r1, %r2;
        ld.param.u64 %rd0, [k_0]; mad.wide.u32 %rd1, %r60, 16, %rd0;
        ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd1];
        st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r8, %r9, %r10, %r11}}, [%r3];
        ld.param.u64 %rd2, [k_1]; mad.wide.u32 %rd3, %r60, 16, %rd2;
        st.global.v4.b32 [%rd3], {{%r8, %r9, %r10, %r11}};
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r3+512], {{%r8, %r9, %r10, %r11}};
        bar.warp.sync -1;
        ld.shared.v4.b32 {{%r12, %r13, %r14, %r15}}, [%r3+512];
        ld.param.u64 %rd4, [k_2]; mad.wide.u32 %rd5, %r60, 16, %rd4;
        st.global.v4.b32 [%rd5], {{%r12, %r13, %r14, %r15}}; ret;"""
    run(body, [matrices, loaded, stored], shared_bytes=1024, head=HEAD)
    for lane in range(32):
        row, column = lane // 4, lane % 4 * 2
        for number, matrix in enumerate(matrices):
            there = matrix.T if turned else matrix
            assert loaded[lane, number] == packed(there[row, column], there[row, column + 1])
    np.testing.assert_array_equal(stored, matrices)


# --------------------------------------------------------------------------------------- wgmma

SWIZZLED = {128: 1, 64: 2, 32: 3}


def laid_out(bits: Any, width: int) -> Any:
    """Columns of B ([16 k, n]) as rows in shared memory whose pieces of 16 bytes change places, or
    (width 16) as core matrices of 8 rows of 16 bytes, first along K."""
    columns = bits.T.copy().view(np.uint8)  # [n, 32]
    room = np.zeros(4096, np.uint8)
    for n, column in enumerate(columns):
        for piece in range(2):
            if width == 16:
                place = n // 8 * 256 + piece * 128 + n % 8 * 16
            else:
                line = n * width // 128  # of 128 bytes, which decide who changes with whom
                place = n * width + piece * 16
                place ^= (line & width // 16 - 1) << 4
            room[place : place + 16] = column[16 * piece : 16 * piece + 16]
    return room


def descriptor(width: int) -> int:
    start, leading, stride = BASE >> 4, 128 >> 4, (256 if width == 16 else 8 * width) >> 4
    return start | leading << 16 | stride << 32 | SWIZZLED.get(width, 0) << 62


def warpgroup(
    width: int,
    *,
    fence: str = "wgmma.fence.sync.aligned;",
    proxy: str = "fence.proxy.async.shared::cta;",
    barrier: str = "bar.sync 0;",
    wait: str = "wgmma.wait_group.sync.aligned 0;",
    between: str = "",
) -> tuple[Any, Any]:
    """Sums of 64 rows and 16 columns: twice the product, and what it should be."""
    a, a_bits = halves((64, 16), "bf16")
    b, b_bits = halves((16, 16), "bf16")
    words = np.array([fragment_a(a_bits[16 * (t // 32) :], t % 32) for t in range(128)], np.uint32)
    room = laid_out(b_bits, width)
    out = np.zeros((128, 8), np.uint32)
    sums = "{%r16, %r17, %r18, %r19, %r20, %r21, %r22, %r23}"
    mma = f"wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {sums}, {{%r8, %r9, %r10, %r11}}"
    body = f"""shl.b32 %r1, %r60, 5; mov.u32 %r2, smem; add.u32 %r3, %r1, %r2;
        ld.param.u64 %rd0, [k_0]; mad.wide.u32 %rd1, %r60, 32, %rd0;
        ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd1];
        st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
        ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd1+16];
        st.shared.v4.b32 [%r3+16], {{%r4, %r5, %r6, %r7}};
        {proxy} {barrier}
        ld.param.u64 %rd2, [k_1]; mad.wide.u32 %rd3, %r60, 16, %rd2;
        ld.global.v4.b32 {{%r8, %r9, %r10, %r11}}, [%rd3];
        mov.b64 %rd10, {descriptor(width):#x}; mov.pred %p1, -1;
        {fence}
        {mma}, %rd10, 0, 1, 1, 0;
        {mma}, %rd10, %p1, 1, 1, 0;
        wgmma.commit_group.sync.aligned;
        {between}
        {wait}
        ld.param.u64 %rd4, [k_2]; mad.wide.u32 %rd5, %r60, 32, %rd4;
        st.global.v4.b32 [%rd5], {{%r16, %r17, %r18, %r19}};
        st.global.v4.b32 [%rd5+16], {{%r20, %r21, %r22, %r23}}; ret;"""
    run(body, [room, words, out], threads=128, shared_bytes=4096, head=HEAD)
    return out.view(np.float32), 2 * a @ b


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_a_product_of_four_warps_reads_shared_memory_by_its_descriptor(width: int) -> None:
    found, wanted = warpgroup(width)
    for thread in range(128):
        rows = wanted[16 * (thread // 32) :]
        expected = [rows[place] for place in sum_places(thread % 32, 8)]
        np.testing.assert_array_equal(found[thread], expected)


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"fence": ""}, Undefined, "no wgmma.fence since"),
        ({"proxy": ""}, Race, "without fence.proxy.async"),
        ({"barrier": ""}, Race, "written by warp"),
        ({"wait": ""}, Undefined, "r16 was not written"),
        ({"between": "mov.b32 %r16, 0;"}, Undefined, "registers of a wgmma under way"),
        ({"between": "mov.b32 %r9, 0;"}, Undefined, "registers of a wgmma under way"),
        (
            {"between": "bar.sync 0; st.shared.b32 [%r3], 0;"},
            Race,
            "that tensor cores may still read",
        ),
    ],
)
def test_a_product_under_way_is_left_alone(
    change: dict[str, str], error: type[Exception], why: str
) -> None:
    with pytest.raises(error, match=why):
        warpgroup(128, **change)
