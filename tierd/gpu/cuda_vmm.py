"""A GPU through the driver's virtual memory calls: chunks that come and go, each a descriptor.

Addresses are reserved for the whole arena, memory is made chunk by chunk and mapped there. A client
imports a chunk's descriptor and maps it for reading only: the GPU's page tables forbid it to write.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tierd.gpu.cuda_device import CudaDevice
from tierd.gpu.device import Export
from tierd.gpu.errors import DeviceError, DeviceUnavailable, OutOfDeviceMemory
from tierd.sizes import format_size

if TYPE_CHECKING:
    from tierd.gpu.device import Kind
    from tierd.gpu.span import Span

SPAN_BUDGETS = 8  # addresses cost nothing; many keep large ranges findable between small ones

_TRIAL = -1  # an arena that is none


@dataclass(slots=True)
class _Chunk:
    """A step is undone in the order mapped, handle; what the driver refused stays set."""

    handle: Any
    mapped: bool = False


class CudaVmmDevice(CudaDevice[_Chunk]):
    """A `device.Device`."""

    kind: Kind = "cuda_vmm"
    elastic = True

    @property
    def backed_bytes(self) -> int:
        return self._spans.backed_bytes

    def span_bytes(self, budget_bytes: int) -> int:
        return -(-budget_bytes // self.chunk_bytes) * self.chunk_bytes * SPAN_BUDGETS

    @property
    def _advice(self) -> str:
        return "--gpu-device cuda_ipc needs none of the virtual memory calls"

    def _check(self) -> None:
        for attribute in (
            "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
        ):  # fmt: skip
            if not self._driver.has(attribute):
                raise DeviceUnavailable(
                    f"gpu:{self.number} ({self._name}): the driver says 0 to {attribute}",
                    self._advice,
                )
        self._check_direct("GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED")
        granularity = self._driver.granularity_bytes()
        if self.chunk_bytes % granularity:
            raise DeviceUnavailable(
                f"gpu:{self.number} ({self._name}) gives memory in multiples of "
                f"{format_size(granularity)}, a chunk has {format_size(self.chunk_bytes)}",
                "choose another --gpu-chunk",
            )
        self._try_a_chunk()

    def _try_a_chunk(self) -> None:
        """In a container each of these may be forbidden although the driver says 1 to both."""
        self.add_arena(_TRIAL, self.chunk_bytes)
        self.back(_TRIAL, 0, 1)
        fd = self.export(_TRIAL, 0).fd
        assert fd is not None
        os.close(fd)
        self.free(_TRIAL, 0, 1)
        self._driver.unreserve(self._spans[_TRIAL].base, self.chunk_bytes)
        self._spans.remove(_TRIAL)

    def add_arena(self, arena: int, span_bytes: int) -> None:
        self._spans.check_new(arena, span_bytes)
        self._spans.add(arena, self._driver.reserve(span_bytes), span_bytes)

    def back(self, arena: int, first: int, count: int) -> None:
        span = self._spans[arena]
        missing = span.missing(first, count)
        self._drop_leftovers(span, first, count)  # they are in the way
        try:
            for chunk in missing:
                span.chunks[chunk] = self._new_chunk(span, chunk)
        except DeviceError:
            for chunk in missing:
                with contextlib.suppress(DeviceError):  # then a leftover
                    self.free(arena, chunk, 1)
            raise

    def free(self, arena: int, first: int, count: int) -> None:
        span = self._spans[arena]
        for chunk in span.present(first, count):
            span.leftovers[chunk] = span.chunks.pop(chunk)
        self._drop_leftovers(span, first, count)

    def export(self, arena: int, chunk: int) -> Export:
        handle = self._spans[arena].backing(chunk).handle
        return Export(self.chunk_bytes, fd=self._driver.export(handle))

    def close(self) -> None:
        for span in self._spans.take_all():
            for number, chunk in (span.chunks | span.leftovers).items():
                self._give_back(partial(self._drop, chunk, span.address(number)))
            self._give_back(partial(self._driver.unreserve, span.base, span.span_bytes))
        self._close_driver()

    def _new_chunk(self, span: Span[_Chunk], number: int) -> _Chunk:
        address = span.address(number)
        try:
            chunk = _Chunk(self._driver.create(self.chunk_bytes))
        except OutOfDeviceMemory as error:
            raise self._out_of_memory(span, number, error) from error
        try:
            self._driver.map(address, self.chunk_bytes, chunk.handle)
            chunk.mapped = True
            self._driver.allow(address, self.chunk_bytes)
        except DeviceError:
            try:
                self._drop(chunk, address)
            except DeviceError:
                span.leftovers[number] = chunk
            raise
        return chunk

    def _drop(self, chunk: _Chunk, address: int) -> None:
        """Undo what was done for it, and not undone yet. Raises DeviceError."""
        if chunk.mapped:
            self._driver.unmap(address, self.chunk_bytes)
            chunk.mapped = False
        if chunk.handle is not None:
            self._driver.release(chunk.handle)
            chunk.handle = None

    def _drop_leftovers(self, span: Span[_Chunk], first: int, count: int) -> None:
        for number in span.left_over(first, count):
            self._drop(span.leftovers[number], span.address(number))
            del span.leftovers[number]

    def _out_of_memory(
        self, span: Span[_Chunk], number: int, error: OutOfDeviceMemory
    ) -> OutOfDeviceMemory:
        try:
            memory = self._driver.memory()
        except DeviceError:
            return error
        which = "a chunk" if span.arena == _TRIAL else f"chunk {number} of arena {span.arena}"
        return OutOfDeviceMemory(
            f"{error}: {which} needs {format_size(self.chunk_bytes)}, "
            f"{format_size(memory.free_bytes)} of {format_size(memory.total_bytes)} are free, "
            f"{format_size(self.backed_bytes)} are tierd's"
        )
