"""What each instruction that only computes does, as an expression: opcode -> Operation.

Every opcode is here with all of its modifiers, or it is not known: nothing is left out in silence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_INTEGERS: Final = ("u16", "s16", "u32", "s32", "u64", "s64")
_WIDER: Final = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
_COMPARISONS: Final = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED: Final = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


@dataclass(frozen=True, slots=True)
class Operation:
    """result, sources: PTX types. expression: of the sources {0}, {1}.. as numpy arrays, with the
    functions of `arithmetic` and `n`, the number of threads; a number that stands in the
    instruction is no array, unless `arrays`."""

    result: str
    sources: tuple[str, ...]
    expression: str
    arrays: bool = False


def _integers() -> dict[str, Operation]:
    found = {}
    for t in _INTEGERS:
        for name, operator in (("add", "+"), ("sub", "-"), ("mul.lo", "*")):
            found[f"{name}.{t}"] = Operation(t, (t, t), f"{{0}} {operator} {{1}}")
        found[f"mad.lo.{t}"] = Operation(t, (t, t, t), "{0} * {1} + {2}")
        found[f"mul.hi.{t}"] = Operation(t, (t, t), "high_half({0}, {1})", arrays=True)
        found[f"mad.hi.{t}"] = Operation(t, (t, t, t), "high_half({0}, {1}) + {2}", arrays=True)
        found[f"div.{t}"] = Operation(t, (t, t), "quotient({0}, {1})")
        found[f"rem.{t}"] = Operation(t, (t, t), "remainder({0}, {1})")
        found[f"min.{t}"] = Operation(t, (t, t), "np.minimum({0}, {1})")
        found[f"max.{t}"] = Operation(t, (t, t), "np.maximum({0}, {1})")
        found[f"shr.{t}"] = Operation(t, (t, "u32"), "shifted_right({0}, {1})", arrays=True)
        if t[0] == "s":
            found[f"neg.{t}"] = Operation(t, (t,), "-{0}")
            found[f"abs.{t}"] = Operation(t, (t,), "np.abs({0})")
        if wide := _WIDER.get(t):
            product = f"{{0}}.astype({wide}) * {{1}}.astype({wide})"
            found[f"mul.wide.{t}"] = Operation(wide, (t, t), product)
            found[f"mad.wide.{t}"] = Operation(wide, (t, t, wide), product + " + {2}")
        if t[1:] != "16":
            found[f"bfe.{t}"] = Operation(t, (t, "u32", "u32"), "field({0}, {1}, {2})", arrays=True)
    return found


def _bits() -> dict[str, Operation]:
    found = {}
    for t in ("b16", "b32", "b64"):
        for name, operator in (("and", "&"), ("or", "|"), ("xor", "^")):
            found[f"{name}.{t}"] = Operation(t, (t, t), f"{{0}} {operator} {{1}}")
        found[f"not.{t}"] = Operation(t, (t,), "~{0}")
        found[f"shl.{t}"] = Operation(t, (t, "u32"), "shifted_left({0}, {1})", arrays=True)
        found[f"shr.{t}"] = Operation(t, (t, "u32"), "shifted_right({0}, {1})", arrays=True)
    for name, operator in (("and", "&"), ("or", "|"), ("xor", "^")):
        found[f"{name}.pred"] = Operation("pred", ("pred", "pred"), f"{{0}} {operator} {{1}}")
    found["not.pred"] = Operation("pred", ("pred",), "~{0}")
    for t in ("b32", "b64"):
        found[f"popc.{t}"] = Operation("u32", (t,), "np.bitwise_count({0}).astype(u32)")
        found[f"clz.{t}"] = Operation("u32", (t,), "leading_zeros({0})", arrays=True)
        found[f"brev.{t}"] = Operation(t, (t,), "reversed_bits({0})", arrays=True)
        found[f"bfi.{t}"] = Operation(
            t, (t, t, "u32", "u32"), "inserted({0}, {1}, {2}, {3})", arrays=True
        )
    for way in ("l", "r"):
        for end in ("wrap", "clamp"):
            options = f"left={way == 'l'}, wraps={end == 'wrap'}"
            found[f"shf.{way}.{end}.b32"] = Operation(
                "b32", ("b32", "b32", "u32"), f"funnel({{0}}, {{1}}, {{2}}, {options})", arrays=True
            )
    found["prmt.b32"] = Operation("b32", ("b32",) * 3, "permuted({0}, {1}, {2})", arrays=True)
    for a in "us":
        for b in "us":
            octets = f"{{0}}.view({a}8), {{1}}.view({b}8), {{2}}.view({_either(a, b)})"
            pairs = f"{{0}}.view({a}16), {{1}}.view({b}8), {{2}}.view({_either(a, b)})"
            types = ("b32", "b32", "b32")
            found[f"dp4a.{a}32.{b}32"] = Operation("b32", types, f"dotted({octets})", arrays=True)
            for half, first in (("lo", 0), ("hi", 2)):
                found[f"dp2a.{half}.{a}32.{b}32"] = Operation(
                    "b32", types, f"dotted_pairs({pairs}, {first})", arrays=True
                )
    return found


def _either(a: str, b: str) -> str:
    """The type of c: signed where a or b is."""
    return "u32" if a == b == "u" else "s32"


def _choices() -> dict[str, Operation]:
    found = {}
    for t in ("b16", "b32", "b64", *_INTEGERS, "f32", "f64"):
        found[f"selp.{t}"] = Operation(t, (t, t, "pred"), "np.where({2}, {0}, {1})")
        known = _COMPARISONS | (_UNSIGNED if t[0] == "u" else {})
        if t[0] == "b":
            known = {name: known[name] for name in ("eq", "ne")}
        for name, operator in known.items():
            compared = f"{{0}} {operator} {{1}}"
            if t[0] == "f" and name == "ne":  # "ne" is false for a NaN, "neu" is true
                compared = "({0} < {1}) | ({0} > {1})"
            found[f"setp.{name}.{t}"] = Operation("pred", (t, t), compared)
            for join, also in (("and", "&"), ("or", "|"), ("xor", "^")):
                found[f"setp.{name}.{join}.{t}"] = Operation(
                    "pred", (t, t, "pred"), f"({compared}) {also} {{2}}"
                )
        if t[0] == "f":
            for name, opposite in (
                ("neu", "=="),
                ("ltu", ">="),
                ("leu", ">"),
                ("gtu", "<="),
                ("geu", "<"),
            ):
                found[f"setp.{name}.{t}"] = Operation("pred", (t, t), f"~({{0}} {opposite} {{1}})")
            found[f"setp.nan.{t}"] = Operation("pred", (t, t), "np.isnan({0}) | np.isnan({1})")
            found[f"setp.num.{t}"] = Operation("pred", (t, t), "~(np.isnan({0}) | np.isnan({1}))")
    return found


def _floats() -> dict[str, Operation]:
    found = {}
    for rounding in ("", ".rn"):
        for name, operator in (("add", "+"), ("sub", "-"), ("mul", "*")):
            for t in ("f32", "f64"):
                found[f"{name}{rounding}.{t}"] = Operation(t, (t, t), f"{{0}} {operator} {{1}}")
            # numpy rounds halves by way of float32, which has bits enough to round twice.
            for pair, part, word in (("f32x2", "f32", "b64"), ("f16x2", "f16", "b32")):
                both = f"({{0}}.view({part}) {operator} {{1}}.view({part})).view({word})"
                found[f"{name}{rounding}.{pair}"] = Operation(word, (word, word), both, arrays=True)
    found["fma.rn.f32"] = Operation("f32", ("f32",) * 3, "fused({0}, {1}, {2})", arrays=True)
    found["fma.rn.f32x2"] = Operation(
        "b64",
        ("b64",) * 3,
        "fused({0}.view(f32), {1}.view(f32), {2}.view(f32)).view(b64)",
        arrays=True,
    )
    for half in ("f16", "bf16"):
        found[f"fma.rn.{half}x2"] = Operation(
            "b32", ("b32",) * 3, f"fused_pairs({{0}}, {{1}}, {{2}}, {half!r})", arrays=True
        )
    # numpy's minimum is a NaN where one of two is; PTX takes the other one.
    found["min.f32"] = Operation("f32", ("f32", "f32"), "np.fmin({0}, {1})")
    found["max.f32"] = Operation("f32", ("f32", "f32"), "np.fmax({0}, {1})")
    found["neg.f32"] = Operation("f32", ("f32",), "-{0}")
    found["abs.f32"] = Operation("f32", ("f32",), "np.abs({0})")
    return found


def _conversions() -> dict[str, Operation]:
    found = {}
    integers = ("u8", "s8", *_INTEGERS)
    for to in integers:
        for source in integers:
            found[f"cvt.{to}.{source}"] = Operation(to, (source,), f"{{0}}.astype({to})")
        found[f"cvt.rn.f32.{to}"] = Operation("f32", (to,), "{0}.astype(f32)")
        found[f"cvt.rzi.{to}.f32"] = Operation(to, ("f32",), f"to_integer({{0}}, {to})")
    found["cvt.f32.f16"] = Operation("f32", ("b16",), "{0}.view(f16).astype(f32)")
    found["cvt.f32.bf16"] = Operation("f32", ("b16",), "from_bfloat16({0})")
    for half, function in (("f16", "to_half"), ("bf16", "to_bfloat16")):
        found[f"cvt.rn.{half}.f32"] = Operation("b16", ("f32",), f"{function}({{0}})", arrays=True)
        both = f"{function}({{0}}).astype(u32) << 16 | {function}({{1}})"
        found[f"cvt.rn.{half}x2.f32"] = Operation("b32", ("f32", "f32"), both, arrays=True)
    for space in ("global", "local", "const"):
        # All of our addresses of these are generic ones.
        found[f"cvta.to.{space}.u64"] = found[f"cvta.{space}.u64"] = Operation(
            "u64", ("u64",), "{0}"
        )
    return found


OPERATIONS: Final = _integers() | _bits() | _choices() | _floats() | _conversions()
