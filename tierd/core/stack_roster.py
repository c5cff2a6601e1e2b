"""Which client, arena and model is on which tier; raises IllegalEvent for what cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tierd.core.errors import IllegalEvent
    from tierd.core.model import ModelAdded
    from tierd.core.stack_books import StackBooks


class Roster:
    """What the machines of a stack do not know of each other. Whoever changes something here has
    asked before whether it may."""

    def __init__(self, books: StackBooks) -> None:
        self.gpu_of: dict[int, int] = {}  #: by client; those of DRAM are not in it
        self.fencing: dict[int, int] = {}  #: clients that are gone, not yet fenced -> their GPU
        self.gpu_of_arena: dict[int, int] = {}
        self.models: dict[int, ModelAdded] = {}
        self.placed: dict[int, list[int]] = {}  #: by model: its GPUs
        self._books = books

    def tier_of(self, client: int) -> int | None:
        """The client's GPU; None for DRAM, whose machine knows whether it is connected."""
        if client < 0:
            raise self.illegal(f"client {client}: ids below 0 belong to the stack")
        return self.gpu_of.get(client)

    def check_new(self, client: int) -> None:
        if self.tier_of(client) is not None or client in self._books.dram.books.clients:
            raise self.illegal(f"client {client} is connected")
        if client in self.fencing:
            raise self.illegal(f"client {client} left GPU {self.fencing[client]}: not fenced yet")

    def check_new_arena(self, arena: int) -> None:
        if arena in self.gpu_of_arena or self._books.dram.books.memory.has_arena(arena):
            raise self.illegal(f"arena {arena} exists")

    def model(self, model: int) -> ModelAdded:
        """One that is served."""
        found = self.models.get(model)
        if found is None:
            raise self.illegal(f"model {model} is not served")
        return found

    def check_gpu(self, gpu: int) -> None:
        count = len(self._books.gpus)
        if not 0 <= gpu < count:
            raise self.illegal(f"there is no GPU {gpu}; this node has {count}")

    def illegal(self, text: str) -> IllegalEvent:
        """The error to raise, with the end of the record of DRAM."""
        return self._books.dram.books.illegal(text)
