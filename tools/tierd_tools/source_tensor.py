"""A tensor of a checkpoint, wherever its elements come from, and the one that lies in a file.

A tensor is read when it is asked for and its pages leave the page cache afterwards, so a pass over
a checkpoint needs the memory of one tensor, whatever the size of the whole.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tierd_layouts.dtypes import ITEM_BYTES
from tierd_tools.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_READ_BYTES = 64 << 20


class SourceTensor(Protocol):
    """A named weight of a checkpoint; sizes are those of the dense tensor.

    Every read may raise CheckpointError, which names the tensor.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def elements(self) -> int: ...

    def read(self) -> NDArray[np.uint8]:
        """The bytes, in memory of their own."""
        ...

    def read_bits(self) -> NDArray[np.unsignedinteger[Any]]:
        """The elements as unsigned integers of their width, in the tensor's shape."""
        ...

    def sample_bits(self, nbytes: int) -> NDArray[np.unsignedinteger[Any]]:
        """Up to `nbytes` from the middle of the tensor, as unsigned integers."""
        ...


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor whose bytes lie as they are in `path`, from `begin` on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    nbytes: int

    @property
    def elements(self) -> int:
        return self.nbytes // ITEM_BYTES[self.dtype]

    def read(self) -> NDArray[np.uint8]:
        return self.read_part(0, self.nbytes)

    def read_bits(self) -> NDArray[np.unsignedinteger[Any]]:
        return self.read().view(f"<u{ITEM_BYTES[self.dtype]}").reshape(self.shape)

    def sample_bits(self, nbytes: int) -> NDArray[np.unsignedinteger[Any]]:
        item = ITEM_BYTES[self.dtype]
        size = min(nbytes, self.nbytes) // item * item
        skipped = (self.nbytes - size) // 2 // item * item
        return self.read_part(skipped, size).view(f"<u{item}")

    def read_part(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """`nbytes` from `offset` of the tensor on, in memory of their own."""
        data = np.empty(nbytes, np.uint8)
        self._read_into(data.data, self.begin + offset)
        return data

    def _read_into(self, target: memoryview, offset: int) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from error
        try:
            done = 0
            while done < len(target):
                part = target[done : done + _READ_BYTES]
                count = os.preadv(descriptor, [part], offset + done)
                if count == 0:
                    raise CheckpointError(
                        f"{self.path} ends at byte {offset + done}, "
                        f"tensor {self.name!r} at byte {self.begin + self.nbytes}"
                    )
                done += count
            os.posix_fadvise(descriptor, offset, len(target), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: reading tensor {self.name!r}: {error.strerror}"
            ) from error
        finally:
            os.close(descriptor)
