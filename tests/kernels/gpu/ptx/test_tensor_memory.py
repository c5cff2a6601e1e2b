"""Tensor memory holds what warps store there; a product of it is there when it was waited for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.gpu.ptx.errors import PtxError, Race, Undefined, UnknownPtx, WrongAddress
from tests.kernels.gpu.ptx.races import BASE
from tests.kernels.gpu.ptx.snippets import run

HEAD = ".extern .shared .align 1024 .b8 smem[];"
WARP0 = "setp.lt.u32 %p2, %r60, 32; mov.b32 %r2, smem;"
ALLOCATE = """@%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2], 64; bar.sync 0;
    ld.shared.b32 %r50, [%r2]; shr.u32 %r3, %r60, 5; shl.b32 %r3, %r3, 21; add.u32 %r4, %r3, %r50;
    bar.sync 0;"""
"""%r50: the address. %r4: that of the warp's own lanes."""
FREE = "bar.sync 0; @%p2 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r50, 64;"
STORE = "tcgen05.st.sync.aligned.16x32bx2.x2.b32 [%r4 + {}], 16, {{%r5, %r6}};"
LOAD = "tcgen05.ld.sync.aligned.16x32bx2.x2.b32 {{%r7, %r8}}, [%r4 + {}], {};"
OUT = """ld.param.u64 %rd0, [k_0]; mad.wide.u32 %rd1, %r60, 8, %rd0;
    st.global.v2.b32 [%rd1], {%r7, %r8};"""


def exchanged(middle: str, *, free: str = FREE) -> Any:
    """Two words of each of 128 threads: what `middle` loads of what it stored."""
    out = np.zeros((128, 2), np.uint32)
    numbers = "shl.b32 %r5, %r60, 1; add.u32 %r6, %r5, 1;"
    body = f"{WARP0} {ALLOCATE} {numbers} {middle} tcgen05.wait::ld.sync.aligned; {OUT} {free} ret;"
    run(body, [out], threads=128, shared_bytes=16, head=HEAD)
    return out


def test_a_store_and_a_load_of_the_same_shape_bring_back_the_registers() -> None:
    wait = "tcgen05.wait::st.sync.aligned;"
    found = exchanged(f"{STORE.format(0)} {wait} {LOAD.format(0, 16)}")
    np.testing.assert_array_equal(found, np.arange(256).reshape(128, 2))


def test_the_upper_half_of_a_warp_sees_columns_further_right() -> None:
    """Of the same lanes: with nothing between the halves both see one place."""
    wait = "tcgen05.wait::st.sync.aligned;"
    found = exchanged(f"{STORE.format(0)} {wait} {LOAD.format(16, 0)}").reshape(4, 2, 16, 2)
    np.testing.assert_array_equal(found[:, 0], found[:, 1])
    np.testing.assert_array_equal(found[:, 1], np.arange(256).reshape(4, 2, 16, 2)[:, 1])


@pytest.mark.parametrize(
    ("middle", "free", "error", "why"),
    [
        (LOAD.format(0, 16), FREE, Undefined, "that nobody wrote"),
        (STORE.format(63) + LOAD.format(63, 16), FREE, WrongAddress, "column 64 of tensor memory"),
        (
            f"mov.b32 %r4, %r50; {STORE.format(0)} {LOAD.format(0, 16)}",
            FREE,
            WrongAddress,
            "a warp at lane 0 of tensor memory, not its own",
        ),
        (STORE.format(0) + LOAD.format(0, 16), "", Undefined, "still allocated at its end"),
    ],
)
def test_a_wrong_use_of_tensor_memory_is_an_error(
    middle: str, free: str, error: type[PtxError], why: str
) -> None:
    with pytest.raises(error, match=why):
        exchanged(middle, free=free)


# -------------------------------------------------------------------------------------- products

SHAPE = 1 << 4 | 1 << 7 | 1 << 10 | 16 // 8 << 17 | 64 // 16 << 24
DESCRIPTOR = (BASE + 1024) >> 4 | 128 >> 4 << 16 | 256 >> 4 << 32 | 1 << 46  # not swizzled


def product(
    *, wait: str = "tcgen05.wait::st.sync.aligned;", barrier: str = "bar.sync 0;", **other: Any
) -> tuple[Any, Any]:
    """64 rows and 16 columns, of A in tensor memory and B in shared memory, added to itself."""
    rng = np.random.default_rng(3)
    a = rng.integers(-8, 9, (64, 16)).astype(np.float32)
    b = rng.integers(-8, 9, (16, 16)).astype(np.float32)
    a_words = (a.view(np.uint32) >> 16).astype(np.uint16).view(np.uint32)  # [64, 8]
    b_halves = (b.T.copy().view(np.uint32) >> 16).astype(np.uint16)  # [n, k]
    core = b_halves.reshape(2, 8, 2, 8).transpose(0, 2, 1, 3).copy().view(np.uint32).reshape(128)
    words = np.zeros((128, 4), np.uint32)
    for thread in range(128):
        row = thread // 32 * 16 + thread % 16
        words[thread] = a_words[row, thread % 32 // 16 * 4 :][:4]
    out = np.zeros((128, 8), np.uint32)
    shape, parked = other.get("shape", SHAPE), other.get("parked", "@!%p5 bra AGAIN;")
    mma = "@%p4 tcgen05.mma.cta_group::1.kind::f16 [%r50 + 0], [%r50 + 16], %rd10, %r51"
    commit = "@%p4 tcgen05.commit.cta_group::1.mbarrier::arrive::one.b64 [%rd11];"
    body = f"""{WARP0} {ALLOCATE}
        ld.param.u64 %rd0, [k_0]; mad.wide.u32 %rd1, %r60, 16, %rd0;
        ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%rd1];
        tcgen05.st.sync.aligned.16x32bx2.x4.b32 [%r4 + 16], 4, {{%r10, %r11, %r12, %r13}};
        {wait}
        ld.param.u64 %rd2, [k_1]; mad.wide.u32 %rd3, %r60, 4, %rd2; ld.global.b32 %r14, [%rd3];
        shl.b32 %r15, %r60, 2; add.u32 %r15, %r15, %r2; st.shared.b32 [%r15+1024], %r14;
        setp.eq.u32 %p3, %r60, 0; add.u32 %r16, %r2, 64; cvt.u64.u32 %rd11, %r16;
        @%p3 mbarrier.init.shared::cta.b64 [%r16], 1;
        fence.proxy.async.shared::cta; {barrier}
        mov.b64 %rd10, {DESCRIPTOR:#x}; mov.b32 %r51, {shape:#x}; mov.pred %p6, 0; mov.pred %p7, -1;
        @!%p2 bra AGAIN;
        elect.sync %r17|%p4, -1; {mma}, %p6; {mma}, %p7; {other.get("commit", commit)}
    AGAIN:
        mbarrier.try_wait.parity.shared.b64 %p5, [%r16], 0; {parked}
        tcgen05.ld.sync.aligned.16x32bx2.x8.b32
            {{%r20, %r21, %r22, %r23, %r24, %r25, %r26, %r27}}, [%r4 + 0], 8;
        tcgen05.wait::ld.sync.aligned;
        ld.param.u64 %rd4, [k_2]; mad.wide.u32 %rd5, %r60, 32, %rd4;
        st.global.v4.b32 [%rd5], {{%r20, %r21, %r22, %r23}};
        st.global.v4.b32 [%rd5+16], {{%r24, %r25, %r26, %r27}}; {FREE} ret;"""
    run(body, [words, core, out], threads=128, shared_bytes=2048, head=HEAD)
    halves = out.view(np.float32).reshape(4, 2, 16, 8)
    return np.concatenate([halves[:, 0], halves[:, 1]], axis=2).reshape(64, 16), 2 * a @ b


def test_a_product_of_tensor_memory_is_there_when_its_mbarrier_says_so() -> None:
    found, wanted = product()
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"wait": ""}, Race, "warps did not wait for"),
        ({"barrier": ""}, PtxError, "no bar|warps did not wait for"),
        ({"commit": ""}, Undefined, "waits at an mbarrier for ever"),
        ({"shape": SHAPE + (64 // 16 << 24)}, UnknownPtx, "instruction descriptor"),
    ],
)
def test_a_product_that_nobody_waits_for_or_knows_is_an_error(
    change: dict[str, Any], error: type[PtxError], why: str
) -> None:
    with pytest.raises(error, match=why):
        product(**change)
