"""PTX text taken apart: entries, their parameters and registers, and the instructions.

Nothing is known here of what an instruction does. Debug information is left out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

from tests.kernels.gpu.ptx.errors import UnknownPtx

BYTES: Final = {
    **{kind + bits: int(bits) // 8 for kind in "bus" for bits in ("8", "16", "32", "64")},
    **{"f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f64": 8},
}
"""Of a type."""
_COMMENT: Final = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_LINE_DIRECTIVE: Final = re.compile(r"^[ \t]*\.(loc|file)\b[^\n]*", re.MULTILINE)
_ENTRY: Final = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{;]*)\{")
_PARAMETER: Final = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.(?P<type>\w+)"
    r"(?:\s+\.ptr(?:\s+\.\w+)*?(?:\s+\.align\s+\d+)?)?\s+(?P<name>[\w$]+)(?:\[(?P<count>\d+)\])?"
)
_SHARED: Final = re.compile(
    r"(?P<extern>\.extern\s+)?\.shared\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?P<name>[\w$]+)(?:\[(?P<count>\d*)\])?\s*;"
)
_REGISTERS: Final = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_INSTRUCTION: Final = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Instruction:
    """guard: a register, or None. negated: executed where the guard is false. line: of the text."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    text: str
    line: int


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    nbytes: int


@dataclass(slots=True)
class Entry:
    """A kernel. labels: of the instruction that follows. registers: their types."""

    name: str
    parameters: list[Parameter]
    threads: int | None
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Static variables: (bytes, alignment). What is external, and begins behind all of them, has
    no bytes here: the launch says how many."""
    external: list[str] = field(default_factory=list)


def entries(text: str) -> dict[str, Entry]:
    """The kernels of a module by name. Raises UnknownPtx."""
    text = _LINE_DIRECTIVE.sub("", _COMMENT.sub(_blank, text))
    found = {}
    heads = list(_ENTRY.finditer(text))
    if not heads:
        raise UnknownPtx("no .entry in the text")
    outside = text[: heads[0].start()]
    for head, following in zip(heads, [*heads[1:], None], strict=True):
        entry = Entry(head[1], _parameters(head[2]), _threads(head[3]))
        _shared(entry, outside)
        end = _Body(entry, text, head.end()).read()
        outside += text[end : following.start() if following else end]
        found[entry.name] = entry
    return found


def _blank(comment: re.Match[str]) -> str:
    """As many lines as before."""
    return " " + "\n" * comment[0].count("\n")


def _parameters(text: str) -> list[Parameter]:
    found = []
    for declared in filter(None, map(str.strip, text.split(","))):
        match = _PARAMETER.fullmatch(declared)
        if match is None or match["type"] not in BYTES:
            raise UnknownPtx(f"parameter {declared!r}")
        found.append(Parameter(match["name"], BYTES[match["type"]] * int(match["count"] or 1)))
    return found


def _threads(directives: str) -> int | None:
    """Of a program, where the text says it."""
    match = re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives)
    if match is None:
        return None
    return int(match[1]) * int(match[2] or 1) * int(match[3] or 1)


def _shared(entry: Entry, text: str) -> None:
    for match in _SHARED.finditer(text):
        if match["extern"]:
            entry.external.append(match["name"])
        else:
            count = int(match["count"] or 1)
            align = int(match["align"] or BYTES[match["type"]])
            entry.shared[match["name"]] = count * BYTES[match["type"]], align


class _Body:
    """Reads from an entry's `{` to its `}`. A block in between has registers and labels of its own;
    they get names that nobody else has."""

    def __init__(self, entry: Entry, text: str, start: int) -> None:
        self._entry = entry
        self._text = text
        self._at = start
        self._scopes: list[dict[str, str]] = [{}]
        self._blocks = 0

    def read(self) -> int:
        """Returns where the text goes on."""
        token = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")
        while self._scopes:
            match = token.match(self._text, self._at)
            if match is None:
                raise UnknownPtx(f"line {self._line(self._at)}: {self._text[self._at :][:80]!r}")
            self._at = match.end()
            if match[1] == "{":
                self._blocks += 1
                self._scopes.append(self._names_of_block())
            elif match[1] == "}":
                self._scopes.pop()
            elif match[2]:
                self._entry.labels[self._renamed(match[2])] = len(self._entry.instructions)
            else:
                self._statement(match[3].strip(), self._line(match.start(3)))
        return self._at

    def _line(self, place: int) -> int:
        return self._text.count("\n", 0, place) + 1

    def _names_of_block(self) -> dict[str, str]:
        """The labels and single registers that the block at `_at` declares."""
        depth, end = 1, self._at
        while depth:
            brace = re.compile(r"[{}]").search(self._text, end)
            if brace is None:
                raise UnknownPtx(f"line {self._line(self._at)}: a block without an end")
            depth += 1 if brace[0] == "{" else -1
            end = brace.end()
        inside = self._text[self._at : end]
        names = re.findall(r"(?:^|[;{}:])\s*([\w$]+):(?!:)", inside)
        for declared in re.findall(r"\.reg\s+\.\w+\s+([^;]*);", inside):
            names += [name.strip() for name in declared.split(",")]
        return {name: f"{name}__{self._blocks}" for name in names}

    def _renamed(self, name: str) -> str:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return name

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            return self._declare(text)
        if match := _SHARED.fullmatch(text + ";"):
            return _shared(self._entry, match[0])
        if not text or text.startswith(".pragma"):
            return None
        match = _INSTRUCTION.fullmatch(text)
        if match is None:
            raise UnknownPtx(f"line {line}: {text!r}")
        operands = tuple(map(self._operand, _split(match[4])))
        guard = match[2] and self._operand(match[2])
        shown = " ".join(text.split())
        self._entry.instructions.append(
            Instruction(match[3], operands, guard, match[1] == "!", shown, line)
        )
        return None

    def _declare(self, text: str) -> None:
        match = _REGISTERS.fullmatch(text)
        if match is None:
            raise UnknownPtx(f"registers {text!r}")
        for name in map(str.strip, match[2].split(",")):
            if many := re.fullmatch(r"(.*)<(\d+)>", name):
                family = {f"{many[1]}{i}": match[1] for i in range(int(many[2]))}
                self._entry.registers.update(family)
            else:
                self._entry.registers[self._renamed(name)] = match[1]

    def _operand(self, text: str) -> str:
        """With the names of this place."""
        if len(self._scopes) == 1:
            return text
        return re.sub(r"%?[\w$]+", lambda name: self._renamed(name[0]), text)


def _split(text: str) -> list[str]:
    """Operands, which commas inside of brackets do not end."""
    found, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            found.append(text[start:place].strip())
            start = place + 1
    found.append(text[start:].strip())
    return [] if found == [""] else found
