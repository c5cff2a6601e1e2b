"""What is known of the devices, and what follows from it: how they are read.

Each device is probed once after the daemon is ready, in a thread of its own; from then on real
reads correct the figures. What the operator has set stays as it was set.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierd.core.cost import (
    CHUNKS,
    DEPTHS,
    MIB,
    SECOND_NS,
    DeviceCost,
    Sample,
    Setting,
    lookahead_bytes,
    reads_in_flight,
    typical_layer,
)
from tierd.core.model import DeviceMeasured
from tierd.core.outlook import loads_of
from tierd.core.prediction import Prediction, predict
from tierd.io.probe import Probe, ProbeResult
from tierd.sizes import format_size

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from tierd.config import Config
    from tierd.engine import Engine
    from tierd.io.ssd import ReaderPool
    from tierd.pack import Pack
    from tierd.registry import Registry

log = logging.getLogger(__name__)

OBSERVED_BYTES = 64 * MIB  #: of real reads make one observation
USUAL_LAYER_BYTES = 64 * MIB  #: while nothing is served
TUNABLE = ("readers", "read_chunk", "reads_in_flight")


@dataclass(slots=True, eq=False)
class Device:
    """One device. `cost` is None until something was measured; `note` says why nothing was."""

    id: int
    setting: Setting
    reads_in_flight: int
    cost: DeviceCost | None = None
    note: str = "not measured yet"
    unseen_bytes: int = 0  #: of layers that were read since the pool's counters were looked at
    read_bytes: int = 0  #: of these counters then
    busy_ns: int = 0
    models: tuple[int, ...] = ()  #: that `layer_bytes` is of
    layer_bytes: int = USUAL_LAYER_BYTES  #: of a typical layer

    @property
    def name(self) -> str:
        return f"{os.major(self.id)}:{os.minor(self.id)}"


class Costs:
    """Belongs to the loop's thread."""

    def __init__(
        self,
        config: Config,
        registry: Registry,
        pool: ReaderPool,
        engine: Engine,
        in_use: Callable[[], bool],
    ) -> None:
        """in_use: whether somebody needs a device now; asked from the probe's threads too."""
        self.devices: dict[int, Device] = {}
        self._config = config
        self._registry = registry
        self._pool = pool
        self._engine = engine
        self._in_use = in_use
        self._given = {
            key
            for key in TUNABLE
            if config.sources.get(key, "default") != "default" and getattr(config, key) is not None
        }

    # -------------------------------------------------------------------------------------- probing

    def probe_new(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts to measure the devices that packs are served from and that are not known yet."""
        packs: dict[int, list[Pack]] = {}
        for pack in self._registry.served.values():
            packs.setdefault(pack.device, []).append(pack)
        for number, served in packs.items():
            if number in self.devices:
                continue
            device = self._device(number)
            fds = [fd for pack in served for fd in pack.shards]
            try:
                probe = Probe(fds, lambda: not self._in_use(), self._config.ssd_bandwidth)
            except OSError as error:
                device.note = f"not measured: {error}"
                continue
            # Nobody waits for this thread: a device may never answer.
            name = f"tierd-probe-{device.name}"
            threading.Thread(
                target=self._probe, args=(loop, device, probe), name=name, daemon=True
            ).start()

    def _probe(self, loop: asyncio.AbstractEventLoop, device: Device, probe: Probe) -> None:
        result = probe.run()
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._probed, device, result)

    def _probed(self, device: Device, result: ProbeResult) -> None:
        took = f"{format_size(result.read_bytes)} in {result.duration_ns / 1e6:.0f} ms"
        if not result.samples:
            device.note = f"not measured at start: {result.reason}"
        elif device.cost is None:  # else real reads were faster, and know better
            device.cost = DeviceCost(result.samples, self._config.ssd_bandwidth)
            device.note = f"measured at start: {took}"
            self._tune(device)
        log.info("device %s: %s", device.name, device.note)

    # ------------------------------------------------------------------------------- real reads

    def read_done(self, number: int, nbytes: int) -> None:
        """A layer was read. Cheap, except once in 64 MiB."""
        device = self._device(number)
        device.unseen_bytes += nbytes
        if device.unseen_bytes < OBSERVED_BYTES:
            return
        counters = self._pool.devices().get(number)
        if counters is None:
            return
        read_bytes = counters.read_bytes - device.read_bytes
        busy_ns = counters.busy_ns - device.busy_ns
        if read_bytes < OBSERVED_BYTES or busy_ns <= 0:
            return  # parts of these layers were counted before: the next one may be enough
        device.unseen_bytes = 0
        device.read_bytes, device.busy_ns = counters.read_bytes, counters.busy_ns
        sample = Sample(
            counters.chunk_bytes, counters.readers, max(read_bytes * SECOND_NS // busy_ns, 1)
        )
        if device.cost is None:
            device.cost = DeviceCost([sample], self._config.ssd_bandwidth)
        else:
            device.cost.observe(sample)
        self._tune(device)

    # ----------------------------------------------------------------------------------- effects

    def _device(self, number: int) -> Device:
        if number not in self.devices:
            config = self._config
            setting = Setting(self._pool.chunk_bytes, config.readers)
            self.devices[number] = Device(number, setting, config.reads_in_flight)
        return self.devices[number]

    def _tune(self, device: Device) -> None:
        """Puts the best setting into effect, if another one is worth the change."""
        assert device.cost is not None
        before = (device.setting, device.reads_in_flight)
        layer_bytes = self._typical_layer(device)
        now = device.setting
        device.setting = device.cost.choose(
            now,
            layer_bytes=layer_bytes,
            chunks=(now.chunk_bytes,) if "read_chunk" in self._given else CHUNKS,
            depths=(now.depth,) if "readers" in self._given else DEPTHS,
        )
        if "reads_in_flight" not in self._given:
            device.reads_in_flight = reads_in_flight(device.setting, layer_bytes)
        if device.setting != now:
            self._pool.configure(
                readers=device.setting.depth,
                chunk_bytes=device.setting.chunk_bytes,
                device=device.id,
            )
        bandwidth = device.cost.bandwidth(device.setting)
        if (device.setting, device.reads_in_flight) != before:
            log.info(
                "device %s: %s/s with %d reads of %s at once, %d layers in flight", device.name,
                format_size(bandwidth), device.setting.depth,
                format_size(device.setting.chunk_bytes), device.reads_in_flight,
            )  # fmt: skip
        self._engine.submit(
            DeviceMeasured(
                self._engine.now(), device.id, bandwidth, device.cost.curve.latency_ns,
                device.reads_in_flight,
            )
        )  # fmt: skip

    def _typical_layer(self, device: Device) -> int:
        packs = [p for p in self._registry.by_model.values() if p.device == device.id]
        models = tuple(pack.model for pack in packs)
        if models != device.models:
            device.models = models
            sizes = [layer.nbytes for pack in packs for layer in pack.index.layers]
            device.layer_bytes = typical_layer(sizes) if sizes else USUAL_LAYER_BYTES
        return device.layer_bytes

    # -------------------------------------------------------------------------------- what is said

    def predictions(self) -> dict[int, Prediction]:
        """By client: of those whose plan is a cycle, on devices and links that were measured."""
        bandwidths = {
            device.id: device.cost.bandwidth(device.setting)
            for device in self.devices.values()
            if device.cost is not None
        }
        stack = self._engine.stack
        links = {} if stack is None else stack.copy_bandwidths()
        loads = [
            load
            for load in (loads_of(self._engine.machine.books) if stack is None else stack.loads())
            if (load.device in bandwidths or not load.ssd_bytes)
            and (load.gpu in links or not load.copy_bytes)
        ]
        return {found.client: found for found in predict(loads, bandwidths, links)}

    def config(self) -> list[dict[str, Any]]:
        """The settings in effect: what a measurement chose instead of a default says so."""
        entries = self._config.effective()
        for entry in entries:
            chosen = self._chosen(entry["key"]) if entry["key"] in TUNABLE else []
            if chosen and entry["key"] not in self._given:
                entry["value"] = chosen[0] if len(chosen) == 1 else chosen
                entry["source"] = "measured"
        return entries

    def _chosen(self, key: str) -> list[int]:
        """The different values of a setting, of the devices that were measured."""
        values = {
            "readers": [device.setting.depth for device in self.devices.values() if device.cost],
            "read_chunk": [
                device.setting.chunk_bytes for device in self.devices.values() if device.cost
            ],
            "reads_in_flight": [
                device.reads_in_flight for device in self.devices.values() if device.cost
            ],
        }
        return sorted(set(values[key]))

    def status(self) -> list[dict[str, Any]]:
        """Each device: what it gives in the way in which it is read, and who chose that."""
        return [
            {
                "device": device.name,
                "bytes_per_s": device.cost and device.cost.bandwidth(device.setting),
                "latency_ns": device.cost and device.cost.curve.latency_ns,
                "stream_bytes_per_s": device.cost and device.cost.curve.stream_bytes_per_s,
                "ceiling_bytes_per_s": device.cost and device.cost.curve.ceiling_bytes_per_s,
                "observations": device.cost.observations if device.cost else 0,
                "readers": device.setting.depth,
                "read_chunk": device.setting.chunk_bytes,
                "reads_in_flight": device.reads_in_flight,
                "given": sorted(self._given),
                "lookahead_bytes": self._lookahead(device),
                "note": device.note,
            }
            for device in self.devices.values()
        ]

    def _lookahead(self, device: Device) -> int | None:
        """What has to be ahead of the client that steps through the most bytes at a time."""
        if device.cost is None:
            return None
        books = self._engine.machine.books
        found = [
            lookahead_bytes(
                device.setting,
                device.cost.bandwidth(device.setting),
                client.plan.compute_ns,
                max(model.layer_bytes[layer] for layer in client.plan.layers()),
            )
            for client in books.clients.values()
            if client.plan is not None
            and client.plan.kind != "open"
            and (model := books.models[client.plan.model]).device == device.id
        ]
        return max(found, default=None)
