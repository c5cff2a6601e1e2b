"""The tiers of this node by name: DRAM, and each GPU that was configured."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tierd.errors import TierUnavailable
from tierd.gpu.direct_reads import DirectReads
from tierd.gpu.registrar import Registrar
from tierd.gpu.registration import HostMemory
from tierd.gpu_settings import played_library
from tierd.gpu_tier import ARENA_NUMBERS, GpuTier
from tierd.io.cufile import CuFileReader, file_id
from tierd.io.cufile_library import CuFileLibrary
from tierd_layouts.wire import DRAM_TIER

if TYPE_CHECKING:
    import asyncio

    from tierd.config import Config
    from tierd.engine import Engine
    from tierd.pack import Pack
    from tierd.registry import Registry
    from tierd.session import Session

_WORD = re.compile(r"[a-z]{1,16}(:[0-9]{1,9})?", re.ASCII)


class Tiers:
    """`gpus` in the order of the configuration, which is how the core counts them."""

    def __init__(self, config: Config, epoch: int, loop: asyncio.AbstractEventLoop) -> None:
        #: of the DRAM arenas, for copies; None without GPUs
        self.registrar: Registrar | None = None
        #: of the GPUs that are read into past DRAM; None: all is copied from there
        self.direct: DirectReads | None = None
        self.gpus: tuple[GpuTier, ...] = ()
        if config.gpu_direct:
            library = CuFileLibrary(played_library())
            self.direct = DirectReads(CuFileReader(library), loop.call_soon_threadsafe)
        if config.gpus:
            registrar = self.registrar = Registrar(HostMemory(), loop.call_soon_threadsafe)
            self.gpus = tuple(
                GpuTier(index, budget, config, epoch, registrar, self.direct, loop)
                for index, budget in enumerate(config.gpus)
            )

    def open(self, engine: Engine, registry: Registry) -> None:
        """Begin to open every device."""
        for gpu in self.gpus:
            gpu.open(engine, registry)

    def place(self) -> None:
        """Other models are served than before."""
        for gpu in self.gpus:
            gpu.place()

    def find(self, name: str) -> GpuTier | None:
        """The GPU of that name; None for DRAM. Raises TierUnavailable, naming what there is."""
        if name == DRAM_TIER:
            return None
        for gpu in self.gpus:
            if gpu.name == name:
                return gpu
        known = ", ".join([DRAM_TIER, *(gpu.name for gpu in self.gpus)])
        shown = name if _WORD.fullmatch(name) else repr(name[:40])
        raise TierUnavailable(f"there is no tier {shown} here; there are {known}")

    def of_arena(self, arena: int) -> GpuTier:
        """The GPU on which an arena is."""
        return self.gpus[arena // ARENA_NUMBERS - 1]

    def forget(self, session: Session) -> None:
        """It is gone, greeted or not."""
        for gpu in self.gpus:
            gpu.forget(session)

    def silent(self) -> dict[str, str]:
        """By name: the GPUs that do not answer, and since when."""
        texts = {gpu.name: gpu.worker.silent() for gpu in self.gpus}
        texts["gpu_direct"] = None if self.direct is None else self.direct.silent()
        return {name: text for name, text in texts.items() if text is not None}

    def alive(self) -> bool:
        """Whether every thread that should serve does."""
        if self.registrar is not None and not self.registrar.alive():
            return False
        if self.direct is not None and not self.direct.alive():
            return False
        return all(gpu.worker.alive() for gpu in self.gpus)

    def closing(self, pack: Pack) -> None:
        """Its files are about to be closed."""
        if self.direct is not None:
            self.direct.forget([file_id(fd) for fd in pack.shards])

    def stop(self) -> None:
        """Decide nothing more."""
        for gpu in self.gpus:
            gpu.stop()

    def close(self) -> None:
        """Give the GPUs back. Blocks; raises TimeoutError when one does not answer."""
        if self.registrar is not None:
            self.registrar.close()
        if self.direct is not None:
            self.direct.close()  # before the memory that it fills
        for gpu in self.gpus:
            gpu.close()

    def close_slots(self) -> None:
        for gpu in self.gpus:
            gpu.slots.close()
