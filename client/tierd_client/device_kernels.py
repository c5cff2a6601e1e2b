"""Which kernels compute with packed matrices on a GPU: Triton's, or operations of torch.

TIERD_GPU_KERNELS names them, `triton` (the default) or `torch`. torch only expands, and is there to
look for errors with; nothing falls back to it.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from tierd_client.errors import UnsupportedDevice

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from tierd_kernels.torch_matrix import TorchMatrix

VARIABLE = "TIERD_GPU_KERNELS"
NAMES = ("triton", "torch")
#: Ampere: the first with arithmetic of bfloat16.
LEAST_CAPABILITY = (8, 0)
#: Of temporaries for each matrix that torch is expanding, at most: enough that the GPU, and not the
#: launching of its kernels, takes the time.
ROOM_BYTES = 128 << 20


class DeviceKernels(Protocol):
    """Kernels of one device. Thread-safe. They wait for the device only where they say so."""

    #: As TIERD_GPU_KERNELS names them.
    name: str
    #: Whether there are products that expand nothing.
    fused: bool

    def expand(self, matrix: TorchMatrix, out: torch.Tensor, faults: torch.Tensor | None) -> None:
        """Write the matrix to `out`. faults: see `faults.new_faults`; without it the call
        waits. Raises KernelError."""

    def temporary_bytes(self, matrix: TorchMatrix) -> int:
        """Memory of the device that an expansion has beside its output."""

    def plan(self, matrix: TorchMatrix, tokens: int) -> Any | None:
        """How to multiply so many tokens with the matrix as it lies; None: expand it. The first
        such matrix is measured, which waits. Raises KernelError."""

    def linear(
        self,
        matrix: TorchMatrix,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        plan: Any,
        faults: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [tokens, cols] @ W.T + bias as `plan` says; faults as in `expand`. Raises KernelError.

        out: [tokens, rows], may be float32, and is then not rounded.
        """


class TorchKernels:
    """Operations of torch, for any device."""

    name = "torch"
    fused = False

    def expand(self, matrix: TorchMatrix, out: torch.Tensor, faults: torch.Tensor | None) -> None:
        from tierd_kernels import torch_expand

        torch_expand.expand(matrix, out, faults=faults, room_bytes=ROOM_BYTES)

    def temporary_bytes(self, matrix: TorchMatrix) -> int:
        from tierd_kernels.torch_expand import TILE_BYTES

        return min(matrix.grid.tiles * TILE_BYTES, ROOM_BYTES)

    def plan(self, matrix: TorchMatrix, tokens: int) -> Any | None:
        return None

    def linear(self, *arguments: Any, **options: Any) -> torch.Tensor:
        raise UnsupportedDevice("operations of torch expand a matrix and multiply then")


class TritonKernels:
    """Those of `tierd_kernels.gpu`."""

    name = "triton"
    fused = True

    def __init__(self, crossovers: Any) -> None:
        self._crossovers = crossovers
        self._expanded: set[tuple[object, ...]] = set()

    def expand(self, matrix: TorchMatrix, out: torch.Tensor, faults: torch.Tensor | None) -> None:
        """The first matrix of each form is tried first. Raises UnsupportedDevice."""
        from tierd_kernels.gpu import expand, trial

        form = (matrix.codec, matrix.bitmap is None, matrix.dtype, matrix.most_planes)
        if form not in self._expanded:
            with _right_kernels():
                trial.Trial(matrix).expansion()
            self._expanded.add(form)
        expand.expand(matrix, out, faults=faults)

    def temporary_bytes(self, matrix: TorchMatrix) -> int:
        return 0

    def plan(self, matrix: TorchMatrix, tokens: int) -> Any | None:
        with _right_kernels():
            return self._crossovers.choice(matrix, tokens)

    def linear(
        self,
        matrix: TorchMatrix,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        plan: Any,
        faults: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        from tierd_kernels.gpu import linear

        return linear.linear(matrix, x, bias, out=out, faults=faults, plan=plan)


@contextmanager
def _right_kernels() -> Iterator[None]:
    """Whoever has kernels that compute something else hears what to do."""
    from tierd_kernels.errors import WrongKernel

    try:
        yield
    except WrongKernel as error:
        raise UnsupportedDevice(
            f"{error}; {VARIABLE}=torch takes operations of torch instead"
        ) from error


def kernels_name() -> str:
    """What TIERD_GPU_KERNELS says. Raises UnsupportedDevice."""
    name = os.environ.get(VARIABLE) or NAMES[0]
    if name not in NAMES:
        raise UnsupportedDevice(f"{VARIABLE}={name} is unknown: {' or '.join(NAMES)}")
    return name


def device_kernels(device: torch.device) -> DeviceKernels:
    """The kernels of a device, the same ones each time. Raises UnsupportedDevice."""
    return _made(kernels_name(), device)


@cache
def _made(name: str, device: torch.device) -> DeviceKernels:
    if name == TorchKernels.name:
        return TorchKernels()
    _check_triton(device)
    from tierd_kernels.gpu.crossover import Crossovers

    return TritonKernels(Crossovers(device))


def _check_triton(device: torch.device) -> None:
    """Raise UnsupportedDevice where its kernels would fail in the middle of a pass."""
    import torch

    other = f'or {VARIABLE}=torch, which expands every matrix (compute="dense")'
    try:
        import triton
    except ImportError as error:
        raise UnsupportedDevice(
            f"kernels for {device} need Triton, which is not installed: pip install triton, {other}"
        ) from error
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        raise UnsupportedDevice(
            f"kernels for {device} need compute capability {_dotted(LEAST_CAPABILITY)}, it has "
            f"{_dotted(capability)}: another GPU, {other}"
        )
    folder = triton.knobs.cache.dir
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UnsupportedDevice(
            f"kernels for {device} are compiled into {folder}, which cannot be written "
            f"({error.strerror}): set TRITON_CACHE_DIR, {other}"
        ) from error


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
