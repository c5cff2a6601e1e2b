"""How instructions are written that move data: between registers, to and from memory, in a warp.

`M` is the machine's program in what is written here: `M.globals`, `M.shared`, its parameters. `t`
are the threads.
"""

from __future__ import annotations

import re
from typing import Final

from tests.kernels.gpu.ptx.errors import UnknownPtx
from tests.kernels.gpu.ptx.memory import ATOMIC
from tests.kernels.gpu.ptx.source import BYTES, Instruction
from tests.kernels.gpu.ptx.translate import Writer, handles

_CACHES: Final = frozenset(
    [
        *("nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "volatile", "weak"),
        *("L1::evict_normal", "L1::evict_first", "L1::evict_last", "L1::no_allocate"),
        *("L2::64B", "L2::128B", "L2::256B"),
    ]
)
"""How an access is cached, which changes no result of one program after another."""
_SPACES: Final = ("param", "global", "shared", "const", "local")
_TYPE: Final = "[busf](?:8|16|32|64)"


def unknown(instruction: Instruction) -> UnknownPtx:
    return UnknownPtx(f"line {instruction.line}: {instruction.text}")


# ------------------------------------------------------------------------------------ registers


@handles(rf"mov\.(pred|{_TYPE})")
def _mov(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    kind = match[1]
    result, source = instruction.operands
    if not result.startswith("{") and not source.startswith("{"):
        return writer.write(result, kind, writer.read(source, kind))
    parts = writer.registers(result if result.startswith("{") else source)
    part = f"u{8 * BYTES[kind] // len(parts)}"
    if source.startswith("{"):
        names = ", ".join(writer.read(each, part, array=True) for each in parts)
        return writer.write(result, kind, f"np.stack([{names}], 1).view({kind}).reshape(-1)")
    name = writer.new_name()
    whole = writer.read(source, kind, array=True)
    writer.line(f"{name} = {whole}.view({part}).reshape(n, {len(parts)})")
    for place, each in enumerate(parts):
        writer.write(each, part, f"{name}[:, {place}].copy()")
    return None


@handles(r"lop3\.b32")
def _lop3(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    result, *sources, table = instruction.operands
    read = ", ".join(writer.read(source, "u32") for source in sources)
    writer.write(result, "u32", f"looked_up({read}, {int(table, 0)})")


# --------------------------------------------------------------------------------------- memory


def _access(instruction: Instruction) -> tuple[str, int, str]:
    """(space, elements, type) of a load or store."""
    space, count, kind = "", 1, ""
    for modifier in instruction.opcode.split(".")[1:]:
        if modifier.removesuffix("::cta") in _SPACES:
            space = modifier.removesuffix("::cta")
        elif modifier in ("v2", "v4"):
            count = int(modifier[1])
        elif re.fullmatch(_TYPE, modifier):
            kind = modifier
        elif modifier not in _CACHES:
            raise unknown(instruction)
    if not kind or space not in ("param", "global", "shared"):
        raise unknown(instruction)
    return space, count, kind


@handles(r"ld\..*")
def _load(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    space, count, kind = _access(instruction)
    nbytes = BYTES[kind] * count
    name, where = writer.new_name(), writer.guard(instruction)
    result, source = instruction.operands
    if space == "param":
        writer.line(f"{name} = M.parameter({source[1:-1]!r}, {nbytes}, n)")
    elif space == "global":
        place = writer.address(source, "u64")
        writer.line(f"{name} = M.globals.load({instruction.line}, {place}, {nbytes}, {where})")
    else:
        place = writer.address(source, "u32")
        writer.line(f"{name} = M.shared.load(t, {place}, {nbytes}, {where})")
    registers = writer.registers(result)
    if len(registers) != count:
        raise unknown(instruction)
    if count == 1:
        return writer.write(registers[0], kind, f"{name}.view({kind})", array=True)
    writer.line(f"{name} = {name}.view({kind}).reshape(n, {count}).T.copy()")
    for place_of, register in enumerate(registers):
        writer.write(register, kind, f"{name}[{place_of}]", array=True)
    return None


@handles(r"st\..*")
def _store(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    space, count, kind = _access(instruction)
    target, source = instruction.operands
    registers = writer.registers(source)
    if len(registers) != count or space == "param":
        raise unknown(instruction)
    unsigned = f"u{8 * BYTES[kind]}"
    data = writer.read(registers[0], unsigned, array=True)
    if count > 1:
        data = f"np.stack({writer.many(source, unsigned)}, 1)"
        data += f".view(UNIT[{BYTES[kind] * count}]).reshape(-1)"
    where = writer.guard(instruction)
    if space == "global":
        place = writer.address(target, "u64")
        writer.line(f"M.globals.store({instruction.line}, {place}, {data}, {where})")
    else:
        writer.line(f"M.shared.store(t, {writer.address(target, 'u32')}, {data}, {where})")


_ORDERS: Final = frozenset(["relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys"])
"""Of an atomic access to what others see: programs run one after another."""


@handles(r"(?:atom|red)\..*")
def _atomic(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    modifiers = [each for each in match[0].split(".")[1:] if each not in _ORDERS]
    if len(modifiers) != 3 or modifiers[0] != "global" or modifiers[1] not in ATOMIC:
        raise unknown(instruction)
    what, kind = modifiers[1:]
    if not re.fullmatch("[bus](32|64)", kind):
        raise unknown(instruction)
    result, target, source = ("_", *instruction.operands)[-3:]
    name, where = writer.new_name(), writer.guard(instruction)
    data = writer.read(source, kind, array=True)
    place = writer.address(target, "u64")
    site = instruction.line
    writer.line(f"{name} = M.globals.atomic({site}, {what!r}, {place}, {data}, {where})")
    writer.write(result, kind, name, array=True)


@handles(r"cp\.async\.c[ag]\.shared(?:::cta)?\.global(?:\.L2::(?:64|128|256)B)?")
def _copy(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    target, source, nbytes, *rest = instruction.operands
    if len(rest) > 1 or int(nbytes, 0) not in (4, 8, 16):
        raise unknown(instruction)
    count = writer.read(rest[0], "u32", array=True) if rest else "None"
    name, where = writer.new_name(), writer.guard(instruction)
    place = writer.address(source, "u64")
    size = int(nbytes, 0)
    writer.line(f"{name} = M.fetched({instruction.line}, {place}, {size}, {count}, {where})")
    writer.line(f"M.shared.copy(t, {writer.address(target, 'u32')}, {name}, {where})")


@handles(r"cp\.async\.(commit_group|wait_group|wait_all)")
def _groups(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    if instruction.guard:
        raise unknown(instruction)
    match match[1]:
        case "commit_group":
            writer.line("M.shared.commit(t)")
        case "wait_group":
            writer.line(f"M.shared.wait(t, {int(instruction.operands[0], 0)})")
        case _:
            writer.line("M.shared.wait(t, None)")


@handles(r"fence\.proxy\.async(?:\.shared::cta)?")
def _proxy(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    if instruction.guard:
        raise unknown(instruction)
    writer.line("M.shared.fence(t)")


@handles(r"membar\.(cta|gl|sys)|fence\.(acq_rel|sc)\.(cta|gpu|sys)")
def _fence(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    """Programs run one after another, and what a warp wrote is there: a barrier is asked for by
    the racecheck in any case."""


# ----------------------------------------------------------------------------------------- warps


def whole_warps(writer: Writer, instruction: Instruction, mask: str) -> None:
    if instruction.guard:
        raise unknown(instruction)
    writer.line(f"whole(t, {writer.read(mask, 'u32')})")


@handles(r"bar\.warp\.sync")
def _warp_barrier(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    whole_warps(writer, instruction, instruction.operands[0])
    writer.line("M.shared.meet(t)")


@handles(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def _shuffle(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    result, source, by, clamp, mask = instruction.operands
    whole_warps(writer, instruction, mask)
    name = writer.new_name()
    operands = f"{writer.read(by, 'u32')}, {writer.read(clamp, 'u32')}"
    value = writer.read(source, "u32", array=True)
    writer.line(f"{name} = shuffled({value}, {match[1]!r}, {operands})")
    number, _, inside = result.partition("|")
    writer.write(number.strip(), "u32", f"{name}[0]", array=True)
    if inside:
        writer.write(inside.strip(), "pred", f"{name}[1]", array=True)


@handles(r"redux\.sync\.(min|max|add|and|or|xor)\.([bus]32)")
def _reduce(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    result, source, mask = instruction.operands
    whole_warps(writer, instruction, mask)
    value = writer.read(source, match[2], array=True)
    writer.write(result, match[2], f"reduced({value}, {match[1]!r})")


@handles(r"vote\.sync\.(any|all|uni|ballot)\.(pred|b32)")
def _vote(writer: Writer, instruction: Instruction, match: re.Match[str]) -> None:
    result, source, mask = instruction.operands
    if (match[1] == "ballot") != (match[2] == "b32"):
        raise unknown(instruction)
    whole_warps(writer, instruction, mask)
    value = writer.read(source, "pred", array=True)
    writer.write(result, match[2], f"voted({value}, {match[1]!r})")
