"""Which place each weight of a model has: computed from a lease, bound to it, or copied.

- nn.Linear: its module becomes a `PackedLinear`, which computes from the lease;
- a dense-stored embedding: bound to the arena's bytes for the time of a forward pass;
- a tensor with at most one dimension above 1 (norms, biases, scalars) and a buffer: copied, when
  its layer is first leased (at once if no site leases that layer);
- anything else is refused, with the list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tierd_client.modules import Bound, Copied, PackedLinear, Site, Stack
from tierd_client.names import is_matrix, refuse_unfit
from tierd_layouts.names import layer_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tierd_client.compute import Arithmetic
    from tierd_client.leasing import LayerLeases
    from tierd_client.names import Stored


class Placement:
    """The places in a model made from placeholders, which it replaces by meta tensors.

    model: as transformers' loader left it. mapping: its parameters' and buffers' stored tensors.
    order: layer numbers as modules were registered, the first guess of the order of use.
    copied_now: what no site will fill in; complete after `install`. device: where the model
    computes; buffers that it made itself (rotary frequencies) go there. Raises UnsupportedModel.
    """

    def __init__(
        self, model: Any, mapping: Mapping[str, Stored], device: torch.device | None = None
    ) -> None:
        self._model = model
        self._device = device or torch.device("cpu")
        self._linears: dict[str, Stored] = {}  # by the module's path
        self._bound: dict[str, Bound] = {}  # by the parameter's name
        self._copied: dict[str, Copied] = {}
        self.copied_now: list[Copied] = []
        self._classify(mapping)
        self._sites = self._site_layers()
        self.order = list(self._sites.values())

    def _classify(self, mapping: Mapping[str, Stored]) -> None:
        model, unfit = self._model, []
        # Tied parameters are one object under several names, of which the pack has one.
        stored_of = {id(model.get_parameter_or_buffer(n)): s for n, s in mapping.items()}
        metas: dict[int, nn.Parameter] = {}
        for name, tensor in [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]:
            stored = stored_of.get(id(tensor))
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            if stored is None:  # a buffer that the model computed itself
                if attribute in module._buffers:
                    module._buffers[attribute] = tensor.to(self._device)
                continue
            meta = metas.setdefault(id(tensor), _meta(tensor))
            if attribute in module._buffers:
                self._copied[name] = Copied(module, attribute, stored, tensor.dtype)
                module._buffers[attribute] = meta.data
                continue
            if not is_matrix(tuple(tensor.shape)):
                self._copied[name] = Copied(module, attribute, stored, tensor.dtype)
            elif type(module) is nn.Linear and attribute == "weight":
                self._linears[path] = stored
            elif isinstance(module, nn.Embedding) and stored.tensor.codec == "dense":
                self._bound[name] = Bound(module, attribute, stored, meta)
            else:
                unfit.append(f"{name} ({type(module).__name__}, {stored.tensor.codec})")
            module._parameters[attribute] = meta
        refuse_unfit(type(model).__name__, unfit)

    def _site_layers(self) -> dict[str, int]:
        """Paths of modules to run inside a lease, in the order of registration, and its layer.

        One for each layer-like group of matrices (`layer_of` the model's names). A group that
        several layers of the pack serve, or whose module is a mere container, is split.
        """
        matrices = {f"{path}.weight": stored.layer for path, stored in self._linears.items()}
        matrices |= {name: bound.stored.layer for name, bound in self._bound.items()}
        groups: dict[str, set[int]] = {}
        for name, layer in matrices.items():
            groups.setdefault(layer_of(name), set()).add(layer)
        sites = {}
        for name, layer in matrices.items():
            group = layer_of(name)
            container = type(self._model.get_submodule(group)).forward is nn.Module.forward
            whole = len(groups[group]) == 1 and not container
            sites[group if whole else name.rpartition(".")[0]] = layer
        paths = [path for path, _ in self._model.named_modules(remove_duplicate=False)]
        return {path: sites[path] for path in paths if path in sites}

    def install(self, leases: LayerLeases, arithmetic: Arithmetic) -> list[Site]:
        """Replace linears, attach sites, and give each what it fills in."""
        model, stack = self._model, Stack()
        replaced: dict[nn.Module, PackedLinear] = {}  # one module may have several paths
        for path, stored in self._linears.items():
            parent, _, attribute = path.rpartition(".")
            linear = model.get_submodule(path)
            if linear not in replaced:
                replaced[linear] = PackedLinear.replacing(linear, stored, arithmetic)
            setattr(model.get_submodule(parent), attribute, replaced[linear])
        made: dict[nn.Module, Site] = {}
        sites: dict[str, Site] = {}
        for path, layer in self._sites.items():
            module = model.get_submodule(path)
            if module not in made:
                made[module] = Site(path, module, layer, leases, stack)
                made[module].enclosing = _innermost(sites, path)
            sites[path] = made[module]
        for name, bound in self._bound.items():
            site = _innermost(sites, name)
            assert site is not None, name  # every matrix is in a group
            site.bound.append(bound)
        for name, copied in self._copied.items():
            module = replaced.get(copied.module, copied.module)
            copied = Copied(module, copied.attribute, copied.stored, copied.dtype)
            site = _innermost(sites, name)
            if site is not None and site.layer == copied.stored.layer:
                site.copied.append(copied)
            else:
                self.copied_now.append(copied)
        return list(made.values())


def _innermost(sites: Mapping[str, Site], path: str) -> Site | None:
    """The innermost site above `path`. Modules are registered before what they contain."""
    while path:
        path = path.rpartition(".")[0]
        if path in sites:
            return sites[path]
    return None


def _meta(tensor: torch.Tensor) -> nn.Parameter:
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(meta, requires_grad=False)
