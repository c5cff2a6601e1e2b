from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tierd_client.errors import UnsupportedModel
from tierd_client.modules import PackedLinear
from tierd_client.names import Stored
from tierd_client.placement import Placement

ARITHMETIC: Any = SimpleNamespace()
LEASES: Any = SimpleNamespace()


class Net(nn.Module):
    """What Placement needs of a transformers model."""

    def get_parameter_or_buffer(self, name: str) -> torch.Tensor:
        module, _, attribute = name.rpartition(".")
        found: torch.Tensor = getattr(self.get_submodule(module), attribute)
        return found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.up(self.norm(x)))
        return result


def net(**modules: nn.Module) -> Net:
    made = Net()
    for name, module in modules.items():
        made.add_module(name, module)
    return made


def placed(model: Net, layers: dict[str, int], codecs: dict[str, str] | None = None) -> Placement:
    """layers: the pack's layer by the longest prefix of a parameter's or buffer's name."""
    mapping = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        prefix = max((p for p in layers if name.startswith(p)), key=len, default=None)
        if prefix is None:
            continue  # the checkpoint has none
        codec = (codecs or {}).get(name, "dense")
        nbytes = tensor.numel() * tensor.itemsize
        record: Any = SimpleNamespace(name=name, codec=codec, dense_bytes=nbytes)
        mapping[name] = Stored(layers[prefix], record)
    return Placement(model, mapping)


def sites_of(placement: Placement) -> dict[str, tuple[int, list[str], list[str]]]:
    """Path -> layer, bound and copied tensors."""
    return {
        site.name: (
            site.layer,
            [bound.stored.name for bound in site.bound],
            sorted(copied.stored.name for copied in site.copied),
        )
        for site in placement.install(LEASES, ARITHMETIC)
    }


def test_a_block_is_a_site_and_so_is_each_module_outside_blocks() -> None:
    model = net(embed=nn.Embedding(5, 4), layers=nn.ModuleList([Block(), Block()]))
    model.add_module("norm", nn.LayerNorm(4))
    model.add_module("head", nn.Linear(4, 5, bias=False))
    layers = {"embed": 0, "layers.0": 1, "layers.1": 2, "norm": 3, "head": 4}
    placement = placed(model, layers, {"layers.1.up.weight": "raw"})
    assert placement.order == [0, 1, 2, 4]
    vectors = ["layers.{}.norm.bias", "layers.{}.norm.weight", "layers.{}.up.bias"]
    assert sites_of(placement) == {
        "embed": (0, ["embed.weight"], []),
        "layers.0": (1, [], [name.format(0) for name in vectors]),
        "layers.1": (2, [], [name.format(1) for name in vectors]),
        "head": (4, [], []),
    }
    assert {copied.stored.name for copied in placement.copied_now} == {"norm.weight", "norm.bias"}
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    block: Any = model.get_submodule("layers.1")
    assert isinstance(block.up, PackedLinear)
    assert [c.module for c in placement.copied_now] == [model.get_submodule("norm")] * 2


def test_a_group_that_two_layers_of_the_pack_serve_is_split() -> None:
    placement = placed(net(layers=nn.ModuleList([Block()])), {"layers.0": 1, "layers.0.down": 2})
    assert sites_of(placement) == {
        "layers.0.up": (1, [], ["layers.0.up.bias"]),
        "layers.0.down": (2, [], []),
    }
    copied = {copied.stored.name for copied in placement.copied_now}
    assert copied == {"layers.0.norm.weight", "layers.0.norm.bias"}


def test_a_container_that_is_never_called_is_no_site() -> None:
    model = net(layers=nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 6, bias=False)})]))
    assert sites_of(placed(model, {"layers.0": 1})) == {"layers.0.up": (1, [], [])}


def test_a_module_with_two_paths_gets_one_site_and_one_packed_linear() -> None:
    shared = nn.Linear(4, 4, bias=False)
    model = net(first=shared, second=shared)
    placement = placed(model, {"first": 0})
    assert sites_of(placement) == {"first": (0, [], [])}
    assert model.get_submodule("first") is model.get_submodule("second")
    assert isinstance(model.get_submodule("second"), PackedLinear)


def test_a_tied_head_is_a_site_of_the_embeddings_layer() -> None:
    model = net(embed=nn.Embedding(5, 4), head=nn.Linear(4, 5, bias=False))
    embed: Any = model.get_submodule("embed")
    head: Any = model.get_submodule("head")
    head.weight = embed.weight
    placement = placed(model, {"embed": 3})
    assert placement.order == [3, 3]
    assert sites_of(placement) == {"embed": (3, ["embed.weight"], []), "head": (3, [], [])}
    head = model.get_submodule("head")
    assert head.weight is embed.weight
    assert sum(1 for _ in model.parameters()) == 1


def test_a_site_inside_a_site_knows_it() -> None:
    class Embedding(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(5, 4)
            self.project = nn.Linear(4, 4, bias=False)

    placement = placed(net(embed=Embedding()), {"embed": 0, "embed.project": 1})
    sites = {site.name: site for site in placement.install(LEASES, ARITHMETIC)}
    assert sites["embed.project"].enclosing is sites["embed"]
    assert sites["embed"].enclosing is None


def test_buffers_of_the_checkpoint_are_copied_and_others_left_alone() -> None:
    model = net(layers=nn.ModuleList([Block()]))
    model.get_submodule("layers.0").register_buffer("mask", torch.zeros(3, 3))
    own = torch.ones(2, 2)
    model.register_buffer("own", own, persistent=False)
    (site,) = placed(model, {"layers.0": 0}).install(LEASES, ARITHMETIC)
    assert "layers.0.mask" in {copied.stored.name for copied in site.copied}
    assert model.get_buffer("layers.0.mask").device.type == "meta"
    assert model.get_buffer("own") is own


class Doubling(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("module", "codec", "text"),
    [
        (nn.Conv1d(2, 3, 2), "dense", "x.weight (Conv1d, dense)"),
        (nn.Bilinear(2, 3, 2), "dense", "x.weight (Bilinear, dense)"),
        (nn.Embedding(3, 2), "raw", "x.weight (Embedding, raw)"),
        (Doubling(2, 3), "raw", "x.weight (Doubling, raw)"),
    ],
)
def test_matrices_of_other_modules_are_refused_by_name(
    module: nn.Module, codec: str, text: str
) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        placed(net(x=module), {"x": 0}, {"x.weight": codec})
    assert text in str(caught.value)


def test_buffers_that_a_model_made_itself_go_where_it_computes_and_stored_ones_do_not() -> None:
    # "meta" stands for a GPU: what is copied from a lease comes from there anyway.
    block = Block()
    block.register_buffer("frequencies", torch.ones(3), persistent=False)
    block.register_buffer("table", torch.ones(5))
    model, elsewhere = net(block=block), torch.device("meta")
    names = ("block.norm.weight", "block.norm.bias", "block.up.weight", "block.up.bias")
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    mapping = {
        name: Stored(0, _record(name, tensors[name]))
        for name in (*names, "block.down.weight", "block.table")
    }
    placement = Placement(model, mapping, elsewhere)
    sites = placement.install(LEASES, ARITHMETIC)
    assert block.frequencies.device == elsewhere
    copied = [*placement.copied_now, *(copied for site in sites for copied in site.copied)]
    assert "block.table" in [one.stored.name for one in copied]
    assert "block.frequencies" not in [one.stored.name for one in copied]


def test_on_the_cpu_a_models_own_buffers_stay_the_same_objects() -> None:
    block = Block()
    block.register_buffer("frequencies", torch.ones(3), persistent=False)
    before = block.frequencies
    placed(net(block=block), {"block.norm": 0, "block.up": 0, "block.down": 0})
    assert block.frequencies is before


def _record(name: str, tensor: torch.Tensor) -> Any:
    nbytes = tensor.numel() * tensor.itemsize
    return SimpleNamespace(name=name, codec="dense", dense_bytes=nbytes)
