"""One JSON object of a pack while it is read: every access is typed, and none is left over."""

from __future__ import annotations

from tierd_layouts.errors import FieldInvalid, FieldMissing, UnknownField
from tierd_layouts.excerpt import excerpt
from tierd_layouts.records import FORMAT_VERSION

MAX_INTEGER = (1 << 63) - 1


class Members:
    """One JSON object while it is read: every access is typed, and no member may be left over."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, dict):
            raise FieldInvalid(f"{where}: expected an object, found {excerpt(value)}")
        self._members: dict[str, object] = dict(value)
        self.where = where

    def take(self, name: str) -> object:
        """Returns and removes a member. Raises FieldMissing."""
        if name not in self._members:
            raise FieldMissing(f"{self.where}: member {name!r} is missing")
        return self._members.pop(name)

    def _path(self, name: str) -> str:
        # Names of the format are short words; aliases and metadata may have any name.
        return f"{self.where}.{name if name.isidentifier() and len(name) < 40 else excerpt(name)}"

    def text(self, name: str) -> str:
        value = self.take(name)
        if not isinstance(value, str):
            raise FieldInvalid(f"{self._path(name)}: expected text, found {excerpt(value)}")
        return _unicode(value, self._path(name))

    def integer(self, name: str) -> int:
        """Returns an integer in [0, 2^63)."""
        return integer_of(self.take(name), f"{self.where}.{name}")

    def integers(self, name: str) -> tuple[int, ...]:
        return integers_of(self.take(name), f"{self.where}.{name}")

    def items(self, name: str) -> list[object]:
        value = self.take(name)
        if not isinstance(value, list):
            raise FieldInvalid(f"{self._path(name)}: expected a list, found {excerpt(value)}")
        return value

    def texts(self, name: str) -> dict[str, str]:
        """Returns an object whose members are all text."""
        members = Members(self.take(name), f"{self.where}.{name}")
        return {_unicode(key, members.where): members.text(key) for key in members.names()}

    def names(self) -> list[str]:
        """What was not taken yet."""
        return list(self._members)

    def finish(self) -> None:
        """Raises UnknownField when a member was not asked for."""
        if self._members:
            names = ", ".join(excerpt(name) for name in sorted(self._members)[:5])
            raise UnknownField(f"{self.where}: version {FORMAT_VERSION} has no member {names}")


def _unicode(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldInvalid(f"{where}: {excerpt(text)} is not Unicode") from error
    return text


def integer_of(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_INTEGER:
        raise FieldInvalid(f"{where}: expected an integer in [0, 2^63), found {excerpt(value)}")
    return value


def integers_of(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise FieldInvalid(f"{where}: expected a list, found {excerpt(value)}")
    return tuple(integer_of(item, f"{where}[{i}]") for i, item in enumerate(value))


def pair_of(value: object, where: str) -> tuple[int, int]:
    items = integers_of(value, where)
    if len(items) != 2:
        raise FieldInvalid(f"{where}: expected 2 integers, found {len(items)}")
    return items[0], items[1]


def hash_of(value: object, where: str) -> int:
    if (
        not isinstance(value, str)
        or len(value) != 16
        or not all(c in "0123456789abcdef" for c in value)
    ):
        raise FieldInvalid(f"{where}: expected 16 lower-case hex digits, found {excerpt(value)}")
    return int(value, 16)
