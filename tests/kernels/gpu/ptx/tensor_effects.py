"""How instructions of the tensor cores are written: matrices in registers, in shared memory and,
of sm_100, in tensor memory, with the mbarriers that say when products are done."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.kernels.gpu.ptx.effects import unknown, whole_warps
from tests.kernels.gpu.ptx.translate import Writer, handles

if TYPE_CHECKING:
    import re

    from tests.kernels.gpu.ptx.source import Instruction


@handles(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(bf16\.bf16|f16\.f16)\.f32")
def _mma(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    result, *sources = instruction.operands
    whole_warps(writer, instruction, "-1")
    name, dtype = writer.new_name(), match[1].split(".")[0]
    a, b, c = (writer.many(source, "u32") for source in sources)
    writer.line(f"{name} = mma({a}, {b}, {c}, {dtype!r})")
    for place, register in enumerate(writer.registers(result)):
        writer.write(register, "u32", f"{name}[{place}]", array=True)


@handles(r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _load_matrices(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    result, source = instruction.operands
    whole_warps(writer, instruction, "-1")
    name, turned = writer.new_name(), bool(match[2])
    place = writer.address(source, "u32")
    writer.line(f"{name} = load_matrices(M.shared, t, {place}, {match[1]}, turned={turned})")
    for number, register in enumerate(writer.registers(result)):
        writer.write(register, "u32", f"{name}[{number}]", array=True)


@handles(r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
def _store_matrices(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    target, source = instruction.operands
    whole_warps(writer, instruction, "-1")
    if len(writer.registers(source)) != int(match[1]):
        raise unknown(instruction)
    place, data = writer.address(target, "u32"), writer.many(source, "u32")
    writer.line(f"store_matrices(M.shared, t, {place}, {data}, turned={bool(match[2])})")


# -------------------------------------------------------------------------------- tensor memory


@handles(r"tcgen05\.alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32")
def _allocate(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    place, columns = instruction.operands
    where = writer.guard(instruction)
    address = writer.address(place, "u32")
    writer.line(f"M.tensor.allocate(t, {address}, {int(columns, 0)}, {where})")


@handles(r"tcgen05\.relinquish_alloc_permit\.cta_group::1\.sync\.aligned")
def _relinquish(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    writer.line(f"M.tensor.relinquish(t, {writer.guard(instruction)})")


@handles(r"tcgen05\.dealloc\.cta_group::1\.sync\.aligned\.b32")
def _free(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    register, columns = instruction.operands
    address, where = writer.read(register, "u32", array=True), writer.guard(instruction)
    writer.line(f"M.tensor.free(t, {address}, {int(columns, 0)}, {where})")


@handles(r"tcgen05\.ld\.sync\.aligned\.16x32bx2\.x(\d+)\.b32")
def _load(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    result, place, split = instruction.operands
    registers = writer.registers(result)
    if len(registers) != int(match[1]):
        raise unknown(instruction)
    whole_warps(writer, instruction, "-1")
    name = writer.new_name()
    address = writer.address(place, "u32")
    writer.line(f"{name} = M.tensor.load(t, {address}, {match[1]}, {int(split, 0)})")
    for number, register in enumerate(registers):
        writer.write(register, "u32", f"{name}[{number}]", array=True)


@handles(r"tcgen05\.st\.sync\.aligned\.16x32bx2\.x(\d+)\.b32")
def _store(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    place, split, source = instruction.operands
    if len(writer.registers(source)) != int(match[1]):
        raise unknown(instruction)
    where = writer.guard(instruction)
    writer.line("whole(t, 0xFFFFFFFF)")
    address, data = writer.address(place, "u32"), writer.many(source, "u32")
    writer.line(f"M.tensor.store(t, {address}, {int(split, 0)}, {data}, {where})")


@handles(r"tcgen05\.wait::(ld|st)\.sync\.aligned")
def _wait(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    whole_warps(writer, instruction, "-1")
    writer.line(f"M.tensor.wait(t, {match[1]!r})")


@handles(r"tcgen05\.mma\.cta_group::1\.kind::f16")
def _multiply(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    d, a, b, shape, adds = instruction.operands
    if not a.startswith("["):  # a descriptor: A in shared memory
        raise unknown(instruction)
    operands = [
        writer.address(d, "u32"),
        writer.address(a, "u32"),
        writer.read(b, "u64", array=True),
        writer.read(shape, "u32", array=True),
        writer.read(adds, "pred", array=True),
    ]
    writer.line(f"M.tensor.multiply(t, {', '.join(operands)}, {writer.guard(instruction)})")


@handles(r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one\.b64")
def _commit(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    address = writer.address(instruction.operands[0], "u64")
    writer.line(f"M.mbarriers.commit({address}, {writer.guard(instruction)})")


@handles(r"mbarrier\.(init|inval)(?:\.shared(?:::cta)?)\.b64")
def _mbarrier(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    address, where = writer.address(instruction.operands[0], "u32"), writer.guard(instruction)
    if match[1] == "init":
        count = int(instruction.operands[1], 0)
        writer.line(f"M.mbarriers.initialise(t, {address}, {count}, {where})")
    else:
        writer.line(f"M.mbarriers.invalidate(t, {address}, {where})")


@handles(r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64")
def _try_wait(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    result, place, parity = instruction.operands
    if instruction.guard:
        raise unknown(instruction)
    address, phase = writer.address(place, "u32"), writer.read(parity, "u32", array=True)
    writer.write(result, "pred", f"M.mbarriers.wait(t, {address}, {phase})", array=True)


@handles(r"elect\.sync")
def _elect(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    result, mask = instruction.operands
    lane, _, chosen = result.partition("|")
    whole_warps(writer, instruction, mask)
    writer.write(lane.strip(), "u32", "np.zeros(n, u32)", array=True)
    writer.write(chosen.strip(), "pred", "t % 32 == 0", array=True)
