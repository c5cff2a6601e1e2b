"""The codecs by name: which arrays each one stores, in which order and under which dtype."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from tierd_layouts.dtypes import ITEM_BYTES, RAW_VALUES_DTYPE

if TYPE_CHECKING:
    from collections.abc import Mapping

#: In stored order. A matrix codec but `raw` may come without `bitmap`: dense form.
ARRAYS_OF_CODEC: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "dense": ("data",),
        "raw": ("bitmap", "offsets", "values"),
        "exponent-packed": ("bitmap", "offsets", "heads", "values"),
        "int8": ("bitmap", "offsets", "scales", "values"),
        "int4": ("bitmap", "offsets", "scales", "values"),
    }
)
ALWAYS_MASKED = frozenset({"raw"})
#: The largest |q| of the codecs that store small integers times a scale for each group.
LEVEL_LIMITS: Mapping[str, int] = MappingProxyType({"int8": 127, "int4": 7})

_DTYPE_OF_ARRAY = {"bitmap": "U64", "offsets": "U32", "heads": "U32", "scales": "U16"}


def array_names(codec: str, *, masked: bool) -> tuple[str, ...]:
    """Returns the arrays of a codec that is known, in stored order."""
    names = ARRAYS_OF_CODEC[codec]
    return names if masked or codec in ALWAYS_MASKED else tuple(n for n in names if n != "bitmap")


def stored_dtype(codec: str, dtype: str, array_name: str) -> str:
    """Returns the dtype of an array of a `dtype` weight; `data` has the weight's own."""
    if array_name == "data":
        return dtype
    if array_name == "values":
        return RAW_VALUES_DTYPE[dtype] if codec == "raw" else "U8"
    return _DTYPE_OF_ARRAY[array_name]


def values_bytes(codec: str, dtype: str, kept: int) -> tuple[int, int]:
    """Returns the least and the most bytes that the record of a tile with `kept` elements takes.

    Before it is filled up to 16 bytes; `exponent-packed` at the most as large as 65535 escapes say.
    """
    item_bytes = ITEM_BYTES[dtype]
    match codec:
        case "raw":
            return kept * item_bytes, kept * item_bytes
        case "int8":
            return kept, kept
        case "int4":
            return -(-kept // 2), -(-kept // 2)
        case _:
            planes = (item_bytes - 1) * 8 * -(-kept // 8)
            return planes, planes + 8 * 8 * -(-kept // 64) + 4 * kept
