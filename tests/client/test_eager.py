"""A served model under `torch.compile`: the same numbers, with tierd's part left as it is."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, LlamaConfig

from tierd_client import load_model
from tierd_client.eager import REASON, eager
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

reset: Any = torch.compiler.reset
IDS = torch.arange(3, 33).view(2, 15)
SETTINGS: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
SETTINGS |= {"pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pruned Llama in float32, where another order of sums changes no token."""
    folder = tmp_path_factory.mktemp("eager")
    torch.manual_seed(5)
    config = LlamaConfig(
        hidden_size=60,
        intermediate_size=100,
        vocab_size=90,
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        dtype=torch.float32,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "source")
    pack(folder / "source", folder / "pack", prune="magnitude", sparsity=0.5)
    unpack(folder / "pack", folder / "reference")
    return folder


class Compiled:
    """The served model, and what a backend that compiles nothing was given of it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.graphs: list[torch.fx.GraphModule] = []
        self.compiled: Any = torch.compile(model, backend=self._backend)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def logits(self, ids: torch.Tensor = IDS) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = self.compiled(ids).logits
        return logits


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Compiled]:
    reset()
    model: Any = load_model(folder / "pack")
    with model.tierd:
        yield Compiled(model)
    reset()


def test_graphs_have_the_model_around_the_products_and_none_of_tierds_memory(
    served: Compiled,
) -> None:
    with torch.no_grad():
        expected = served.model(IDS).logits
    before = served.model.tierd.statistics()
    assert torch.equal(served.logits(), expected)
    after = served.model.tierd.statistics()
    calls = [str(node.target) for graph in served.graphs for node in graph.graph.nodes]
    assert any("scaled_dot_product_attention" in call for call in calls)
    assert any("silu" in call for call in calls)
    assert not any("linear" in call for call in calls)
    assert after.blocked_calls - before.blocked_calls == 7, "each matrix once, by our kernels"


def test_a_compiled_model_generates_the_same_tokens(served: Compiled, folder: Path) -> None:
    reference: Any = AutoModelForCausalLM.from_pretrained(folder / "reference")
    expected = reference.generate(IDS, **SETTINGS)
    forward, before = served.model.forward, len(served.graphs)
    try:
        served.model.forward = torch.compile(forward, backend=served._backend)
        assert torch.equal(served.model.generate(IDS, **SETTINGS), expected)
    finally:
        served.model.forward = forward
    assert len(served.graphs) > before


def test_leases_are_left_when_a_compiled_pass_fails(served: Compiled) -> None:
    expected = served.logits()
    with pytest.raises(IndexError):
        served.logits(torch.tensor([[1000] * 15] * 2))
    assert served.model.tierd.leases._holdings.users == 0
    assert torch.equal(served.logits(), expected)


def test_one_whole_graph_is_refused_with_the_reason(served: Compiled) -> None:
    compiled: Any = torch.compile(served.model, backend="eager", fullgraph=True)
    with pytest.raises(Unsupported, match=REASON), torch.no_grad():
        compiled(IDS)
    with torch.no_grad():
        assert served.model(IDS).logits.shape == (2, 15, 90)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own imports
def test_inductor_compiles_what_is_between_the_products(served: Compiled) -> None:
    reset()
    block, x = served.model.model.layers[0].mlp, torch.randn(3, 60)
    compiled: Any = torch.compile(block, backend="inductor")
    with torch.no_grad():
        expected = block(x)
        got = compiled(x)
    assert counters["inductor"]["fxgraph_cache_miss"] + counters["inductor"]["fxgraph_cache_hit"]
    torch.testing.assert_close(got, expected)


def test_an_ordinary_call_is_what_it_was() -> None:
    @eager
    def add(one: int, two: int) -> int:
        """Says so."""
        return one + two

    assert add(1, two=2) == 3
    assert add.__doc__ == "Says so."
