"""Packed tensors in private memory, leases that have them, and kernels that know both."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch.nn import functional

from tierd_client.errors import TensorCorrupt
from tierd_kernels.errors import KernelError
from tierd_kernels.faults import NO_FAULT, fault_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from tests.client.fake_streams import FakeStreams


@dataclass
class FakeWeight:
    """A PackedTensor that decodes to `content`; its kernels find `fault`."""

    lease: FakeLease
    name: str
    content: torch.Tensor
    fault: int = NO_FAULT

    packed = True

    @property
    def where(self) -> str:
        return f"model/layer, {self.name!r}"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.content.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.content.dtype

    def torch_matrix(self) -> FakeWeight:
        if self.lease.ended:
            raise TensorCorrupt("read after its lease")
        return self


class FakeLease:
    """Of one layer; a new one for each grant."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = {name: FakeWeight(self, name, each) for name, each in weights.items()}
        self.ended = False

    def __getitem__(self, name: str) -> Any:
        return self.weights[name]


class FakeLeases:
    """`Glimpses` of what the test puts into `here`, layer by layer."""

    def __init__(self) -> None:
        self.here: dict[int, FakeLease] = {}
        self.log: list[tuple[str, int]] = []
        self.streams: FakeStreams | None = None

    @contextmanager
    def glimpse(self, layer: int) -> Iterator[Any]:
        lease = self.here.get(layer)
        if lease is None:
            yield None
            return
        try:
            yield lease
        finally:
            stream = self.streams.current().name if self.streams is not None else ""
            self.log.append((f"fenced in {stream}", layer))


class FakeKernels:
    """Notes what it is asked for. fused_up_to: tokens that are multiplied without expanding."""

    name = "fake"
    fused = True

    def __init__(self, streams: FakeStreams | None = None, fused_up_to: int = 0) -> None:
        self.streams = streams
        self.fused_up_to = fused_up_to
        self.planned: list[tuple[str, int]] = []
        self.expanded: list[tuple[str, str]] = []
        self.multiplied: list[tuple[str, int]] = []
        self.cells: list[torch.Tensor | None] = []

    def _find(self, weight: Any, faults: torch.Tensor | None) -> None:
        self.cells.append(faults)
        if weight.fault == NO_FAULT:
            return
        if faults is None:
            raise KernelError(fault_text(weight.fault))
        faults.fill_(min(int(faults), weight.fault))

    def expand(self, matrix: Any, out: torch.Tensor, faults: torch.Tensor | None) -> None:
        stream = self.streams.current().name if self.streams is not None else ""
        self.expanded.append((matrix.name, stream))
        out.detach().copy_(matrix.content)
        self._find(matrix, faults)

    def temporary_bytes(self, matrix: Any) -> int:
        return 1000 * len(matrix.content)

    def plan(self, matrix: Any, tokens: int) -> Any | None:
        self.planned.append((matrix.name, tokens))
        return SimpleNamespace(tokens=tokens) if tokens <= self.fused_up_to else None

    def linear(self, matrix: Any, x: torch.Tensor, bias: Any, **options: Any) -> torch.Tensor:
        assert options["plan"].tokens == len(x)
        self.multiplied.append((matrix.name, len(x)))
        self._find(matrix, options["faults"])
        product = functional.linear(x, matrix.content, bias)
        out = options.get("out")
        return product if out is None else out.copy_(product)
