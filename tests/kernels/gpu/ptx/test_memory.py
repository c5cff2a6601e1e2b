"""An access lies in an array that was given, at a multiple of its bytes, or is an error."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.gpu.ptx.errors import PtxError, Race, Undefined, WrongAddress
from tests.kernels.gpu.ptx.machine import kernel, launch
from tests.kernels.gpu.ptx.memory import Array
from tests.kernels.gpu.ptx.snippets import run, text

AT = "ld.param.u64 %rd0, [k_0]; mad.wide.u32 %rd1, %r60, {step}, %rd0;"


def test_vectors_are_loaded_and_stored_in_their_order() -> None:
    source, target = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    body = f"""
        {AT.format(step=16)} ld.param.u64 %rd2, [k_1]; mad.wide.u32 %rd3, %r60, 16, %rd2;
        ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%rd1];
        st.global.v2.b32 [%rd3], {{%r4, %r3}};
        st.global.v2.b32 [%rd3+8], {{%r2, %r1}};
        ret;"""
    run(body, [source, target])
    np.testing.assert_array_equal(target.reshape(-1, 4), source.reshape(-1, 4)[:, ::-1])


def test_a_narrow_load_is_extended_as_its_type_says() -> None:
    source, target = np.full(4, 0x80, np.uint8), np.zeros(8, np.uint32)
    body = f"""{AT.format(step=1)} ld.param.u64 %rd2, [k_1]; mad.wide.u32 %rd3, %r60, 8, %rd2;
        ld.global.nc.u8 %r1, [%rd1]; ld.global.s8 %r2, [%rd1];
        st.global.v2.b32 [%rd3], {{%r1, %r2}}; ret;"""
    run(body, [source, target], threads=4)
    assert target.tolist() == [0x80, 0xFFFFFF80] * 4


@pytest.mark.parametrize(
    ("offset", "why"),
    [
        (4, r"byte 128 of k_0 at 0x[0-9a-f]+, 128 bytes"),
        (-4, "byte -4 of k_0"),
        (2, "no multiple of 4 bytes"),
    ],
)
def test_an_address_outside_or_askew_is_an_error_with_the_nearest_array(
    offset: int, why: str
) -> None:
    array = np.zeros(32, np.uint32)
    body = f"{AT.format(step=4)} ld.global.b32 %r1, [%rd1+{offset}]; ret;"
    with pytest.raises(
        WrongAddress, match=rf"program \(0, 0, 0\), line \d+, 'ld.global.b32.*{why}"
    ):
        run(body, [array])


def test_what_a_guard_leaves_out_is_not_accessed() -> None:
    array = np.arange(16, dtype=np.uint32)
    body = f"""{AT.format(step=4)} setp.lt.u32 %p1, %r60, 16; mov.b32 %r1, 9;
        @%p1 ld.global.b32 %r1, [%rd1]; add.u32 %r1, %r1, 1;
        @%p1 st.global.b32 [%rd1], %r1; ret;"""
    run(body, [array])
    np.testing.assert_array_equal(array, np.arange(1, 17))


def test_an_array_that_is_read_only_is_not_written_to() -> None:
    array = np.zeros(32, np.uint32)
    code = kernel(text(f"{AT.format(step=4)} st.global.b32 [%rd1], %r60; ret;", 1))
    given = [Array("weights", array.ctypes.data, array.nbytes, writable=False)]
    with pytest.raises(WrongAddress, match=r"writes to weights at .*, not to be written"):
        launch(code, (1,), 32, [array.ctypes.data], given)
    assert not array.any()


def test_two_threads_that_store_different_numbers_to_one_place_are_an_error() -> None:
    array = np.zeros(1, np.uint32)
    with pytest.raises(Undefined, match="two threads store different numbers"):
        run(f"{AT.format(step=0)} st.global.b32 [%rd1], %r60; ret;", [array])


def test_atomics_of_all_threads_count() -> None:
    cells = np.array([100, 5], np.int64)
    body = f"""{AT.format(step=0)} cvt.u64.u32 %rd2, %r60; sub.s64 %rd2, %rd2, 3;
        atom.global.gpu.acq_rel.min.s64 %rd3, [%rd1], %rd2;
        red.relaxed.gpu.global.add.u64 [%rd1+8], 2; ret;"""
    run(body, [cells], programs=2)
    assert cells.tolist() == [-3, 5 + 2 * 64]


def test_two_programs_of_a_grid_share_nothing_that_one_of_them_writes() -> None:
    mine = "mov.u32 %r1, %ctaid.x; mad.wide.u32 %rd2, %r1, 128, %rd1;"
    array, start = np.zeros(64, np.uint32), AT.format(step=4)
    run(
        f"{start} {mine} ld.global.b32 %r2, [%rd2]; st.global.b32 [%rd2], %r2; ret;",
        [array],
        programs=2,
    )
    with pytest.raises(
        Race, match=r"program number 1 writes byte 0 of k_0.* program number 0 wrote"
    ):
        run(f"{start} st.global.b32 [%rd1], %r60; ret;", [array], programs=2)
    with pytest.raises(
        Race, match=r"program number 1 reads byte 0 of k_0.* program number 0 wrote"
    ):
        run(
            f"{start} {mine} st.global.b32 [%rd2], 0; ld.global.b32 %r2, [%rd1]; ret;",
            [array],
            programs=2,
        )
    with pytest.raises(Race, match=r"program number 2 writes byte 0 of k_0.* others read"):
        run(
            f"""{start} ld.global.b32 %r2, [%rd1]; mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 2;
            @%p1 st.global.b32 [%rd1], 0; ret;""",
            [array],
            programs=3,
        )


def test_as_many_arguments_as_parameters_are_given() -> None:
    with pytest.raises(PtxError, match="0 arguments for 1 parameters"):
        launch(kernel(text("ret;", 1)), (1,), 32, [], [])
