"""What a product with packed weights may differ by from the exact one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tierd_client.client import Client
from tierd_client.scratch import Scratch
from tierd_layouts import quantised


def capture(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of every linear, [tokens, features], with the outliers of trained models."""
    inputs: dict[str, torch.Tensor] = {}

    def note(module: nn.Module, args: Any) -> None:
        inputs[names[module]] = args[0].reshape(-1, args[0].shape[-1])

    names: dict[nn.Module, str]
    names = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    handles = [module.register_forward_pre_hook(note) for module in names]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return inputs


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def check_products(socket: str, name: str, inputs: dict[str, torch.Tensor]) -> int:
    """Every packed matrix times the input of its linear, within the promised bounds."""
    checked = 0
    with Client(socket) as client:
        opened = client.open(name)
        for number, layer in enumerate(opened.index.layers):
            with opened.acquire(number) as lease:
                for tensor in layer.tensors:
                    module = tensor.name.removesuffix(".weight")
                    if tensor.codec == "dense" or module not in inputs:
                        continue
                    x = inputs[module]
                    weight = lease[tensor.name].dense()
                    exact = x.double() @ weight.double().T
                    theirs = relative_error(nn.functional.linear(x, weight), exact)
                    blocked = lease[tensor.name].blocked(x, None, Scratch())
                    assert relative_error(blocked, exact) <= 1.05 * theirs, tensor.name
                    if tensor.codec in ("int8", "int4"):  # not rounded to the dtype when fused
                        matrix = opened.matrices.packed(layer, tensor, lease.offset)
                        exact = x.double() @ torch.from_numpy(quantised.weights(matrix)).double().T
                        theirs = relative_error(exact.to(x.dtype), exact)
                    single = lease[tensor.name].linear_f32(x)
                    assert relative_error(single, exact) < 1e-5, tensor.name
                    if x.dtype != torch.float32:
                        ours = relative_error(lease[tensor.name].linear(x), exact)
                        assert ours <= 1.05 * theirs, tensor.name
                    checked += 1
    return checked
