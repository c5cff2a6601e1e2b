"""Events and actions as plain values, and back: what a recorded day consists of on a disk.

A record becomes `["@Acquire", at_ns, client, ...]`, its fields in the order of `SCHEMA`; a tuple
becomes a list, numbers, texts and None stay. No tuple of the vocabulary begins with a text, so the
first element tells the two apart.
"""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import TYPE_CHECKING, Any, get_args

from tierd.core.errors import UnknownRecord
from tierd.core.model import Action, AdoptedSlot, Event, LayerKey

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TYPES: tuple[type, ...] = (LayerKey, AdoptedSlot, *get_args(Event), *get_args(Action))
_BY_NAME = {cls.__name__: cls for cls in _TYPES}
#: The fields of every record, in the order in which they are written.
SCHEMA = {cls.__name__: tuple(field.name for field in fields(cls)) for cls in _TYPES}
_MARK = "@"


def plain(value: object) -> Any:
    """The value as lists, numbers and texts."""
    if isinstance(value, tuple):
        return [plain(item) for item in value] if value and not _is_flat(value) else list(value)
    if is_dataclass(value):
        name = type(value).__name__
        return [_MARK + name, *(plain(getattr(value, field)) for field in SCHEMA[name])]
    return value


def _is_flat(values: tuple[object, ...]) -> bool:
    """Whether it is one of many numbers: an order, sizes."""
    return type(values[0]) is int


def restored(value: Any, schema: Mapping[str, Sequence[str]] = SCHEMA) -> Any:
    """What `plain` made of it. `schema`: of whoever wrote it; fields that are new since then get
    their defaults. Raises UnknownRecord for a record or a field that is not known here."""
    if not isinstance(value, list):
        return value
    if not value or not isinstance(value[0], str) or not value[0].startswith(_MARK):
        return tuple(restored(item, schema) for item in value)
    name = value[0][len(_MARK) :]
    cls, written = _BY_NAME.get(name), schema.get(name)
    if cls is None or written is None:
        raise UnknownRecord(f"the recording has a {name!r}, which this tierd does not know")
    if len(written) != len(value) - 1:
        raise UnknownRecord(f"a {name} has {len(value) - 1} values, its schema {len(written)}")
    known = {field.name: field for field in fields(cls)}
    if unknown := [field for field in written if field not in known]:
        raise UnknownRecord(f"a {name} has {unknown[0]!r}, which this tierd does not know")
    given = {field: restored(item, schema) for field, item in zip(written, value[1:], strict=True)}
    for field in known.values():
        if field.name not in given and field.default is MISSING:
            raise UnknownRecord(f"a {name} of the recording has no {field.name!r}")
    return cls(**given)
