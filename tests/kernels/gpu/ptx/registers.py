"""The registers of a program's threads, and who wrote them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tests.kernels.gpu.ptx.operands import DTYPES, variable

if TYPE_CHECKING:
    from tests.kernels.gpu.ptx.source import Entry

_POISON: Final = 0xA5


def dtypes_of(entry: Entry) -> dict[str, np.dtype[Any]]:
    """Of its registers."""
    return {
        variable(register): np.dtype("?" if kind == "pred" else f"u{DTYPES[kind].itemsize}")
        for register, kind in entry.registers.items()
    }


class Registers:
    """Arrays [threads], of what `dtypes_of` says, by the names of `operands.variable`. None of them
    is changed in place."""

    def __init__(self, dtypes: dict[str, np.dtype[Any]], threads: int) -> None:
        self._dtypes = dtypes
        self._threads = threads
        self._values: dict[str, Any] = {}
        self._partial: dict[str, Any] = {}
        """Of registers that not all threads wrote: which did."""

    def get(self, name: str, threads: Any = None) -> Any | None:
        """Of these threads or (None) all; None where one of them has not written it."""
        value = self._values.get(name)
        if value is None:
            return None
        written = self._partial.get(name)
        if written is not None and not (written if threads is None else written[threads]).all():
            return None
        return value if threads is None else value[threads]

    def get_old(self, name: str, threads: Any = None) -> Any:
        """As `get`, with a pattern where nothing was written."""
        value = self._values.get(name)
        if value is None:
            value = self._poisoned(name)
        return value if threads is None else value[threads]

    def written(self, name: str, threads: Any = None) -> Any | None:
        """Which of these threads have written it; None: all."""
        if name not in self._values:
            return np.zeros(self._threads if threads is None else len(threads), np.bool_)
        found = self._partial.get(name)
        if found is not None and threads is not None:
            found = found[threads]
        return None if found is None or found.all() else found

    def put(self, name: str, value: Any, threads: Any = None, written: Any = None) -> None:
        """written: by which of them, all without it."""
        if threads is None:
            self._values[name] = value
            self._partial.pop(name, None)
            if written is not None:
                self._partial[name] = written.copy()
            return
        new = self._values.get(name)
        if new is None:
            new = self._poisoned(name)
            self._partial[name] = np.zeros(self._threads, np.bool_)
        else:
            new = new.copy()
        new[threads] = value
        self._values[name] = new
        if written is not None:
            self._partial.setdefault(name, np.ones(self._threads, np.bool_))
        if name in self._partial:
            self._partial[name][threads] = True if written is None else written

    def forget(self, name: str) -> None:
        """Until it is put again nobody wrote it."""
        self._values.pop(name, None)
        self._partial.pop(name, None)

    def _poisoned(self, name: str) -> Any:
        dtype = self._dtypes[name]
        if dtype == np.bool_:
            return np.ones(self._threads, dtype)
        return np.full(self._threads * dtype.itemsize, _POISON, np.uint8).view(dtype)
