"""Element types, by their safetensors names."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Bytes of one element.
ITEM_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "U16": 2,
        "I16": 2,
        "F16": 2,
        "BF16": 2,
        "U32": 4,
        "I32": 4,
        "F32": 4,
        "U64": 8,
        "I64": 8,
        "F64": 8,
    }
)

#: What codec `raw` may hold, and the dtype under which a shard stores its values.
RAW_VALUES_DTYPE: Mapping[str, str] = MappingProxyType({"BF16": "U16", "F16": "U16", "F32": "U32"})

#: numpy's dtype for the bits of an element, by its bytes.
UNSIGNED: Mapping[int, np.dtype[Any]] = MappingProxyType(
    {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
)
