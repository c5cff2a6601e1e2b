"""The shortest way through a kernel's code, on code that is short enough to count by hand."""

from __future__ import annotations

import pytest

from tierd_kernels.gpu.instructions import count, fewest, fewest_of_loop


def code(*lines: str) -> str:
    """As cuobjdump prints it: each instruction is followed by its encoding, and again by a half."""
    text = ["\t\tFunction : expand_tiles", '\t.headerflags\t@"EF_CUDA_SM90"']
    for index, line in enumerate(lines):
        half = "                                     /* 0x000fe200078e00ff */"
        text += [f"        /*{16 * index:04x}*/  {line} ;   /* 0x00000a00ff017b82 */", half]
    return "\n".join(text)


STRAIGHT = code("LDC R1, c[0x0][0x28]", "NOP", "IADD3 R2, R2, R1, RZ", "EXIT", "BRA 0x40", "NOP")


def test_padding_is_no_instruction() -> None:
    assert count(STRAIGHT) == 4
    assert len(fewest(STRAIGHT)) == 3


def test_a_branch_leads_around_what_lies_between() -> None:
    around = code("@P0 BRA 0x40", "MOV R1, R2", "MOV R1, R2", "MOV R1, R2", "EXIT")
    assert [each.name for each in fewest(around)] == ["BRA", "EXIT"]


def test_both_arms_of_a_branch_are_weighed() -> None:
    arms = code(
        "BSSY B0, 0x70",
        "@!P1 BRA 0x40",
        "MOV R1, R2",
        "BSYNC B0",
        "MOV R1, R2",
        "MOV R1, R2",
        "BSYNC B0",
        "@P0 EXIT",
        "EXIT",
    )
    assert len(fewest(arms)) == 6


def test_a_way_can_be_counted_through_marked_instructions() -> None:
    """Of three rounds that may be left out, the shortest way takes as many as are asked for."""
    rounds = ["@P0 BRA 0x70", "PRMT R1, R2, 0x6420, R3"] * 3
    loop = code("MOV R1, R2", *rounds, "@P1 BRA 0x0", "EXIT")
    assert len(fewest_of_loop(loop)) == 3
    assert len(fewest_of_loop(loop, "0x6420", 1)) == 5
    assert len(fewest_of_loop(loop, "0x6420", 3)) == 8
    with pytest.raises(ValueError, match="3 instructions with the operand 0x6420, not 4"):
        fewest_of_loop(loop, "0x6420", 4)


def test_an_exit_of_some_lanes_is_no_end() -> None:
    assert len(fewest(code("@P0 EXIT", "STG.E [R2.64], R4", "EXIT"))) == 3


def test_a_turn_of_the_longest_loop_is_counted_alone() -> None:
    loops = code(
        "MOV R1, R2",
        "LDG.E R4, desc[UR4][R2.64]",
        "@P0 BRA 0x50",
        "MOV R1, R2",
        "MOV R1, R2",
        "@P1 BRA 0x50",
        "@!P2 BRA 0x10",
        "EXIT",
    )
    assert len(fewest_of_loop(loops)) == 4
    with pytest.raises(ValueError, match="no loop in 4 instructions"):
        fewest_of_loop(code("MOV R1, R2", "MOV R1, R2", "@P0 BRA 0x30", "EXIT"))


def test_the_integer_pipe_takes_what_is_no_multiplication() -> None:
    mixed = code(
        "SHF.R.U32.HI R1, RZ, 0x3, R2",
        "IMAD.IADD R1, R1, 0x1, R2",
        "@P0 LOP3.LUT R1, R1, 0xff, RZ, 0xc0, !PT",
        "IDP.4A.U8.U8 R1, R1, R2, RZ",
        "LEA.HI.X R1, R1, R2, RZ, 0x2, P0",
        "UIADD3 UR4, UR4, 0x1, URZ",
        "EXIT",
    )
    found = [each.name.split(".")[0] for each in fewest(mixed) if each.of_integer_pipe]
    assert found == ["SHF", "LOP3", "LEA"]
