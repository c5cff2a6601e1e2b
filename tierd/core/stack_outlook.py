"""What the clients of all tiers ask of disks and links: the input of `prediction`, for three tiers.

What does not stay on a GPU is copied once in a pass, and read once where it does not stay in DRAM
either. A GPU that reads directly copies what is in DRAM and reads the rest past it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tierd.core.outlook import load_of, loads_of, passing, steady_plans
from tierd.core.residency import SlotState

if TYPE_CHECKING:
    from tierd.core.prediction import Load
    from tierd.core.stack_books import StackBooks


def loads_of_stack(books: StackBooks) -> list[Load]:
    """One pass of every client of whom something can be said, whatever tier it lives on."""
    loads = [load for load in loads_of(books.dram.books) if load.client >= 0]
    return loads + [load for gpu in range(len(books.gpus)) for load in _on_gpu(books, gpu)]


def _on_gpu(books: StackBooks, gpu: int) -> list[Load]:
    machine = books.gpus[gpu].books
    dram = books.dram.books.models
    loads = []
    for client, plan in steady_plans(machine):
        model = dram[plan.model]
        there = [
            slot is not None and slot.state is SlotState.RESIDENT
            if books.config.is_direct(gpu)
            else bool(model.kept[layer])
            for layer, slot in enumerate(model.slots)
        ]
        moving = passing(machine, plan)
        sizes = model.layer_bytes
        ssd_bytes = sum(sizes[layer] for layer in moving if not there[layer])
        copy_bytes = sum(sizes[layer] for layer in moving)
        if books.config.is_direct(gpu):
            copy_bytes -= ssd_bytes
        load = load_of(client, plan, model.device, ssd_bytes)
        loads.append(replace(load, gpu=gpu, copy_bytes=copy_bytes))
    return loads
