"""What the daemon asks of a GPU: memory by chunks, a way for clients to it, copies from DRAM.

A *chunk* is what is taken from the driver and given back to it. An arena is a span of addresses on
the GPU; `back` puts memory behind some of its chunks, `export` makes one readable for a client.
Calls are made on the device's own thread (`worker.GpuWorker`), but for those that say thread-safe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing import Literal

    Kind = Literal["cuda_vmm", "cuda_ipc", "memfd"]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A GPU that was opened. `uuid` is how a client finds the same one; `driver` is its version."""

    name: str
    uuid: str
    driver: str
    total_bytes: int
    free_bytes: int  #: before any chunk was taken


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """What the GPU says about its memory, other processes' included."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Export:
    """One of two: a descriptor, which the receiver of this object closes, or a handle as bytes.

    nbytes: the memory behind it: a chunk (`fd`), or the whole arena (`handle`).
    """

    nbytes: int
    fd: int | None = None
    handle: bytes | None = None

    def __post_init__(self) -> None:
        if (self.fd is None) == (self.handle is None):
            raise ValueError("an export is a descriptor or a handle")


class Pending(Protocol):
    """A copy that was started. Until `wait` returned, its source must stay as it is."""

    def wait(self) -> None:
        """Until all bytes are on the GPU, visible to every client. Raises DeviceError: then some
        may not be, and nothing reads the source any more. Thread-safe; called once."""


class Device(Protocol):
    """One GPU. Arguments that are no range of an arena are the caller's mistake: ValueError."""

    @property
    def kind(self) -> Kind: ...

    @property
    def number(self) -> int:
        """N of `gpu:N`."""

    @property
    def chunk_bytes(self) -> int: ...

    @property
    def elastic(self) -> bool:
        """Whether `free` gives memory back to the driver: then there may be several arenas, and
        the budget may be lowered. Else all memory is taken by the first `add_arena`."""

    @property
    def backed_bytes(self) -> int:
        """Memory taken from the driver and not given back yet. Thread-safe."""

    @property
    def unpinned_bytes(self) -> int:
        """Copied so far from memory that was not registered: slower. Thread-safe."""

    def span_bytes(self, budget_bytes: int) -> int:
        """How many addresses an arena of this device should have. Thread-safe."""

    def open(self) -> DeviceInfo:
        """Load what is needed. Raises DeviceUnavailable; then it may be called again."""

    def memory(self) -> DeviceMemory:
        """Now. Raises DeviceError."""

    def add_arena(self, arena: int, span_bytes: int) -> None:
        """span_bytes: addresses, a multiple of a chunk. Raises DeviceError, and DeviceUnavailable
        when this device can have no (further) arena."""

    def back(self, arena: int, first: int, count: int) -> None:
        """Put memory behind chunks [first, first + count); those that have some keep it.

        Raises DeviceError: then the arena is as it was before the call.
        """

    def free(self, arena: int, first: int, count: int) -> None:
        """Give the memory of chunks [first, first + count) back; those that have none are skipped.

        Nobody may read them any more, and no copy to them be under way. Raises DeviceError: then a
        later call goes on where this one ended.
        """

    def export(self, arena: int, chunk: int) -> Export:
        """`chunk` has memory, or ValueError. Raises DeviceError."""

    def copy(self, arena: int, offset: int, source: memoryview) -> Pending:
        """Start to copy `source`, host memory in one piece, to `offset` in the arena, where every
        chunk has memory (or ValueError). Raises DeviceError: then nothing reads the source."""

    def parts(self, arena: int, offset: int, nbytes: int) -> list[tuple[int, int]]:
        """Where the range lies on the GPU: (address, bytes) of each allocation, in order. Every
        chunk has memory, or ValueError."""

    def enter(self) -> None:
        """Calls of the calling thread to other libraries are about this GPU from now on.
        Thread-safe. Raises DeviceError."""

    def fetch(self, address: int, nbytes: int) -> bytearray:
        """Bytes of one allocation on the GPU, back on the host. Thread-safe. Raises DeviceError."""

    def register(self, address: int, nbytes: int) -> None:
        """Make host memory that exists reachable for this process' GPUs. Thread-safe, may take
        0.1 s for each GB. Raises DeviceError."""

    def unregister(self, address: int, nbytes: int) -> None:
        """Undo one `register`. No copy from there may be under way. Thread-safe. Raises
        DeviceError."""

    def close(self) -> None:
        """Give everything back. No copy may be under way. What cannot be given back is left to
        the end of the process; that is not an error."""
