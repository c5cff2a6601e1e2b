"""The readers: threads that fill slots from shards with direct reads, and verify what they read.

A layer is cut into chunks, and all threads of its device work on the chunks of the layer that came
first. A few blocking threads reach what a device gives (measured against io_uring), because reading
and hashing release the GIL.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierd.errors import ReadCancelled
from tierd.io.ssd_lane import DeviceStatistics, Lane
from tierd.io.throttle import Throttle
from tierd_layouts.records import BLOCK_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd.errors import ReadError
    from tierd.io.ssd_job import ReadJob, ReadResult

#: Larger reads cost less CPU, and no device that was measured gave less with them; a limit of the
#: bandwidth is kept more evenly with small ones.
CHUNK_BYTES = 16 << 20
THROTTLED_CHUNK_BYTES = BLOCK_BYTES
SILENT_NS = 10_000_000_000  # that one read may take before an operator should hear of it


@dataclass(frozen=True, slots=True)
class ReaderStatistics:
    """Of all devices together."""

    read_bytes: int  #: in chunks that were verified, also those of layers that failed
    reads: int  #: layers, verified
    failed: int  #: layers
    busy_ns: int  #: during which at least one chunk was being read, summed over devices
    throttled_ns: int  #: that threads waited for the bandwidth limit, summed over threads
    bandwidth_limit: int | None  #: bytes per second
    direct: bool  #: no chunk went through the page cache so far


class ReaderPool:
    """All devices, a lane each. It belongs to the event loop's thread, except `close`, which
    blocks.

    Threads start with the first job: a daemon that nobody asks is ready at once.
    """

    def __init__(self, readers: int, bandwidth: int | None = None) -> None:
        """readers: threads for each device. bandwidth: bytes per second of all of them together,
        None = all."""
        self._readers = readers
        self._chunk_bytes = CHUNK_BYTES if bandwidth is None else THROTTLED_CHUNK_BYTES
        self._throttle = None if bandwidth is None else Throttle(bandwidth, BLOCK_BYTES)
        self._lanes: dict[int, Lane] = {}
        self._closed = False

    def configure(
        self,
        *,
        readers: int | None = None,
        chunk_bytes: int | None = None,
        device: int | None = None,
    ) -> None:
        """Read with other sizes from now on; what is None stays.

        chunk_bytes: the most that one read asks for, a multiple of 4 KiB; blocks are verified
        whole. device: None = all that are read, and those that will be.
        """
        if readers is not None and readers < 1:
            raise ValueError(f"at least 1 reader, not {readers}")
        if chunk_bytes is not None and (chunk_bytes < PAGE_BYTES or chunk_bytes % PAGE_BYTES):
            raise ValueError(f"a chunk is whole pages of 4 KiB, not {chunk_bytes} bytes")
        if device is None:
            self._readers = readers or self._readers
            self._chunk_bytes = chunk_bytes or self._chunk_bytes
            lanes = list(self._lanes.values())
        else:
            lanes = [self._lane(device)]
        for lane in lanes:
            before = lane.statistics()
            lane.configure(readers or before.readers, chunk_bytes or before.chunk_bytes)

    @property
    def chunk_bytes(self) -> int:
        """The most that one read of a device asks for, unless that device was configured."""
        return self._chunk_bytes

    def submit(self, job: ReadJob, on_done: Callable[[ReadResult | ReadError], None]) -> None:
        """Queue a job. `on_done` is called once, on the running loop, when no thread touches the
        target any more. Raises ReadCancelled after `close`."""
        loop = asyncio.get_running_loop()

        def deliver(outcome: ReadResult | ReadError) -> None:
            loop.call_soon_threadsafe(on_done, outcome)

        if self._closed:
            raise ReadCancelled(
                f"layer {job.layer!r} of pack {job.pack!r} was not read: the daemon shuts down"
            )
        self._lane(job.device).submit(job, deliver)

    def _lane(self, device: int) -> Lane:
        lane = self._lanes.get(device)
        if lane is None:
            name = f"tierd-ssd-{len(self._lanes)}"
            lane = Lane(name, self._readers, self._chunk_bytes, self._throttle)
            self._lanes[device] = lane
        return lane

    def devices(self) -> dict[int, DeviceStatistics]:
        return {device: lane.statistics() for device, lane in self._lanes.items()}

    def statistics(self) -> ReaderStatistics:
        devices = [lane.statistics() for lane in self._lanes.values()]
        return ReaderStatistics(
            read_bytes=sum(device.read_bytes for device in devices),
            reads=sum(device.reads for device in devices),
            failed=sum(device.failed for device in devices),
            busy_ns=sum(device.busy_ns for device in devices),
            throttled_ns=self._throttle.waited_ns if self._throttle else 0,
            bandwidth_limit=self._throttle.rate_bytes_per_s if self._throttle else None,
            direct=not any(lane.buffered() for lane in self._lanes.values()),
        )

    def alive(self) -> bool:
        """Whether every thread that was started still serves. A device that does not answer is
        not counted here: its layers wait, those of other devices need not."""
        return all(lane.alive() for lane in self._lanes.values())

    def silent(self) -> dict[int, str]:
        """The devices that do not answer: what waits for each, and for how long."""
        return {
            device: f"the device of pack {', '.join(map(repr, found.packs))} has not answered for "
            f"{found.waiting_ns / 1e9:.0f} s: its layers wait, other devices are read on"
            for device, found in self.devices().items()
            if found.waiting_ns > SILENT_NS
        }

    def notes(self) -> list[str]:
        """What an operator should know about these reads, for `tierctl status`."""
        return list(self.silent().values()) + [
            f"{file} is read through the page cache: its file system refuses O_DIRECT"
            for lane in self._lanes.values()
            for file in lane.buffered()
        ]

    def close(self, timeout_s: float = 10.0) -> None:
        """Give up what is queued (ReadCancelled), let the chunks in flight end, stop the threads.

        Outcomes are on the loop when this returns. Raises TimeoutError when a device does not
        answer: then a thread may still write into its target.
        """
        self._closed = True
        for lane in self._lanes.values():
            lane.give_up()
        deadline = time.monotonic() + timeout_s
        stuck = [name for lane in self._lanes.values() for name in lane.wait_ended(deadline)]
        if stuck:
            raise TimeoutError(f"{', '.join(stuck)} did not end their reads in {timeout_s} s")
