from __future__ import annotations

import copy
import pickle
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tierd_client.errors import UnsupportedOperation, ViewStillAlive
from tierd_client.modules import Bound, Copied, PackedLinear, Site, Stack

STORED: Any = SimpleNamespace(name="w", layer=0, tensor=SimpleNamespace(name="w", codec="raw"))


class FakeLeases:
    """Layer 0 holds `w`; counts who is inside."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.inside = 0
        self.entered = 0
        self.on_leave: BaseException | None = None
        self.on_enter: BaseException | None = None

    def enter(self, layer: int) -> Any:
        if self.on_enter is not None:
            raise self.on_enter
        self.inside += 1
        self.entered += 1
        tensor = SimpleNamespace(view=lambda: self.weight, dense=lambda: self.weight.clone())
        return {"w": tensor}

    def leave(self, layer: int) -> None:
        self.inside -= 1
        if self.on_leave is not None:
            raise self.on_leave


class Double:
    def linear(self, stored: Any, x: torch.Tensor, bias: Any) -> torch.Tensor:
        assert stored is STORED
        return 2 * x


def meta_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device="meta"), requires_grad=False)


def embedding_site(leases: Any) -> tuple[nn.Embedding, Site]:
    module = nn.Embedding(4, 3)
    module.weight = meta_parameter(4, 3)
    site = Site("embed", module, 0, leases, Stack())
    site.bound.append(Bound(module, "weight", STORED, module.weight))
    return module, site


def packed_linear() -> PackedLinear:
    linear = nn.Linear(3, 3)
    linear.weight = meta_parameter(3, 3)
    arithmetic: Any = Double()
    return PackedLinear.replacing(linear, STORED, arithmetic)


def test_a_packed_linear_is_an_nn_linear_that_shows_its_shape() -> None:
    packed = packed_linear()
    assert isinstance(packed, nn.Linear)
    assert packed.weight.shape == (3, 3)
    assert packed.weight.device.type == "meta"
    assert "w: raw" in repr(packed)
    assert torch.equal(packed(torch.ones(1, 3)), torch.full((1, 3), 2.0))


def test_a_packed_linear_keeps_the_hooks_of_the_module_that_it_replaces() -> None:
    linear = nn.Linear(3, 3)
    seen = []
    linear.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    arithmetic: Any = Double()
    PackedLinear.replacing(linear, STORED, arithmetic)(torch.ones(1, 3))
    assert seen == [PackedLinear]


@pytest.mark.parametrize(
    ("operation", "word"),
    [
        (lambda module: module.to(torch.float16), "moving or converting"),
        (lambda module: nn.Sequential(module).half(), "moving or converting"),
        (lambda module: nn.Sequential(module).to_empty(device="cpu"), "moving or converting"),
        (copy.deepcopy, "copying or pickling"),
        (pickle.dumps, "copying or pickling"),
    ],
)
def test_what_would_move_or_copy_the_weight_is_refused_by_name(operation: Any, word: str) -> None:
    with pytest.raises(UnsupportedOperation, match=f"{word}.*'w'"):
        operation(packed_linear())


@pytest.mark.parametrize("operation", [copy.deepcopy, pickle.dumps])
def test_a_module_with_a_site_is_not_copied(operation: Any) -> None:
    module, _ = embedding_site(FakeLeases(torch.zeros(4, 3)))
    with pytest.raises(UnsupportedOperation, match="copying or pickling 'embed'"):
        operation(module)


def test_an_embedding_sees_the_arena_only_during_its_forward() -> None:
    leases = FakeLeases(torch.arange(12.0).view(4, 3))
    module, _ = embedding_site(leases)
    outside = module.weight
    assert torch.equal(module(torch.tensor([1])), leases.weight[1:2])
    assert module.weight is outside
    assert leases.inside == 0


def test_a_failing_forward_gives_the_lease_back() -> None:
    leases = FakeLeases(torch.zeros(4, 3))
    module, _ = embedding_site(leases)
    with pytest.raises(IndexError):
        module(torch.tensor([99]))
    assert leases.inside == 0
    assert module.weight.device.type == "meta"
    assert module(torch.tensor([0])).shape == (1, 3)


def test_a_view_that_outlives_the_forward_is_reported() -> None:
    leases = FakeLeases(torch.zeros(4, 3))
    module, _ = embedding_site(leases)
    leases.on_leave = ViewStillAlive("a view of w")
    with pytest.raises(ViewStillAlive):
        module(torch.tensor([0]))


def test_a_view_in_a_traceback_does_not_hide_the_error_that_made_it() -> None:
    leases = FakeLeases(torch.zeros(4, 3))
    module, _ = embedding_site(leases)
    leases.on_leave = ViewStillAlive("a view of w")
    with pytest.raises(IndexError):
        module(torch.tensor([99]))


def test_a_site_that_gets_no_lease_leaves_nothing() -> None:
    leases = FakeLeases(torch.zeros(4, 3))
    module, _ = embedding_site(leases)
    leases.on_enter = ConnectionError("gone")
    with pytest.raises(ConnectionError):
        module(torch.tensor([0]))
    leases.on_enter = None
    module(torch.tensor([0]))
    assert (leases.inside, leases.entered) == (0, 1)


def test_what_a_keyboard_interrupt_cut_short_is_left_at_the_next_forward() -> None:
    # torch calls hooks after an Exception only.
    leases = FakeLeases(torch.zeros(4, 3))
    module, _ = embedding_site(leases)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        module(torch.tensor([0]))
    assert leases.inside == 1
    handle.remove()
    module(torch.tensor([0]))
    assert leases.inside == 0
    assert module.weight.device.type == "meta"


def test_a_site_inside_another_is_no_interruption() -> None:
    leases: Any = FakeLeases(torch.zeros(4, 3))
    stack = Stack()
    inner = nn.Identity()
    outer = nn.Sequential(inner, inner)
    enclosing = Site("outer", outer, 0, leases, stack)
    Site("outer.inner", inner, 0, leases, stack).enclosing = enclosing
    outer(torch.zeros(1))
    assert (leases.inside, leases.entered) == (0, 3)


def test_the_arena_stays_visible_until_the_last_thread_leaves() -> None:
    leases = FakeLeases(torch.arange(12.0).view(4, 3))
    module, _ = embedding_site(leases)
    inside, leave = threading.Event(), threading.Event()
    devices: list[str] = []

    def wait(module: Any, args: Any) -> None:
        if threading.current_thread() is thread:
            inside.set()
            leave.wait(10)
            devices.append(module.weight.device.type)

    module.register_forward_pre_hook(wait)
    thread = threading.Thread(target=module, args=(torch.tensor([0]),))
    thread.start()
    assert inside.wait(10)
    module(torch.tensor([1]))
    leave.set()
    thread.join()
    assert devices == ["cpu"]
    assert module.weight.device.type == "meta"


@pytest.mark.parametrize("buffer", [False, True])
def test_a_vector_is_copied_once_in_the_models_dtype(buffer: bool) -> None:
    leases: Any = FakeLeases(torch.tensor([1.0, 2.0]))
    module = nn.Identity()
    if buffer:
        module.register_buffer("scale", torch.empty(2, device="meta"))
    else:
        module.register_parameter("scale", meta_parameter(2))
    site = Site("norm", module, 0, leases, Stack())
    site.copied.append(Copied(module, "scale", STORED, torch.bfloat16))
    module(torch.zeros(1))
    scale = module.get_buffer("scale") if buffer else module.get_parameter("scale")
    assert torch.equal(scale, torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert not scale.requires_grad
    assert site.copied_bytes == 4
    leases.weight = torch.tensor([5.0, 6.0])
    module(torch.zeros(1))
    assert scale[0] == 1
