"""Models offloaded by Accelerate, which decoding through tiers is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def cpu_offload(folder: Path, device: str) -> Any:
    """All weights in memory of the CPU; each module's go to the device before its forward."""
    import accelerate
    import torch

    return accelerate.cpu_offload(_in_memory(folder), torch.device(device))


def disk_offload(folder: Path, device: str, offload: Path) -> Any:
    """All weights in files; each module's are read and go to the device before its forward."""
    import accelerate
    import torch

    return accelerate.disk_offload(_in_memory(folder), offload, torch.device(device))


def device_map(folder: Path, device: str, gpu: int, cpu: int, offload: Path) -> Any:
    """Filled in order: so many bytes of the device, of the CPU, and the rest in files. What is not
    on the device goes there before each forward."""
    from accelerate import infer_auto_device_map, init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    model.tie_weights()
    first: dict[int | str, int] = {} if device == "cpu" else {0: gpu}
    found = infer_auto_device_map(
        model, max_memory={**first, "cpu": cpu, "disk": 1 << 50}, dtype=config.dtype,
        no_split_module_classes=list(model._no_split_modules or []),
    )  # fmt: skip
    return load_checkpoint_and_dispatch(
        model, folder, device_map=found, offload_folder=offload, dtype=config.dtype,
        offload_buffers=False, force_hooks=True,
    ).eval()  # fmt: skip


def _in_memory(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
