"""Decoding that a GPU repeats by itself: here the host plays the GPU, and its graphs."""

from __future__ import annotations

import gc
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, StaticCache

from tests.client.fake_streams import FakeStream, FakeStreams
from tests.client.small_checkpoints import SIZES, save
from tests.daemon.conftest import RunningDaemon
from tierd_client import load, load_model, tensors
from tierd_client.compute import Arithmetic
from tierd_client.errors import (
    ClientClosed,
    LeaseLost,
    TensorCorrupt,
    UnsupportedDevice,
    UnsupportedOperation,
)
from tierd_client.graphs import NEW, PRESSED, TAKEN
from tierd_client.opened import OpenedModel
from tierd_kernels import torch_expand
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

IDS = torch.arange(3, 15).view(2, 6)
LAYERS = 3
PRODUCTS = LAYERS * 7
STEPS = 5


@dataclass(frozen=True)
class Served:
    """A small Llama on a daemon with a GPU that has room for all of it."""

    socket: str
    reference: Any

    def tokens(self, ids: torch.Tensor = IDS, steps: int = STEPS) -> torch.Tensor:
        return generate(self.reference, ids, steps)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("graphs")
    save(LlamaConfig(**SIZES, num_key_value_heads=1), folder / "source")
    pack(folder / "source", folder / "packs" / "tiny", prune="magnitude", sparsity=0.5)
    unpack(folder / "packs" / "tiny", folder / "reference")
    flags = ["--models", str(folder / "packs"), "--dram", "64MiB", "--gpu", "0=24MiB"]
    flags += ["--gpu-device", "memfd", "--gpu-chunk", "2MiB"]
    daemon = RunningDaemon(str(folder / "tierd.sock"), folder / "log", flags)
    try:
        daemon.wait_ready()
        yield Served(daemon.socket, AutoModelForCausalLM.from_pretrained(folder / "reference"))
    finally:
        daemon.kill()


class Pressure:
    on = False


@pytest.fixture
def pressure(monkeypatch: pytest.MonkeyPatch) -> Pressure:
    """Whether memory is short, as the slot table says."""
    pressure = Pressure()
    monkeypatch.setattr(OpenedModel, "pressed", property(lambda opened: pressure.on))
    return pressure


class Kernels:
    """Of few operations: each matrix is expanded once for all. Up to two tokens are fused."""

    name = "played"
    fused = True

    def __init__(self) -> None:
        self._dense: dict[int, torch.Tensor] = {}

    def expand(self, matrix: Any, out: torch.Tensor, faults: Any) -> None:
        out.detach().copy_(self._expanded(matrix))

    def temporary_bytes(self, matrix: Any) -> int:
        return 0

    def plan(self, matrix: Any, tokens: int) -> str | None:
        return "fused" if tokens <= 2 else None

    def linear(self, matrix: Any, x: torch.Tensor, bias: Any, **options: Any) -> torch.Tensor:
        return functional.linear(x, self._expanded(matrix), bias)

    def _expanded(self, matrix: Any) -> torch.Tensor:
        place = matrix.values.data_ptr()
        if place not in self._dense:
            dense = torch.empty(matrix.rows, matrix.cols, dtype=torch.bfloat16)
            torch_expand.expand(matrix, dense)
            self._dense[place] = dense
        return self._dense[place]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    streams, kernels = FakeStreams(), Kernels()
    monkeypatch.setattr("tierd_client.compute.device_kernels", lambda device: kernels)
    monkeypatch.setattr(tensors, "KERNEL_DEVICES", set())
    monkeypatch.setattr(load, "Arithmetic", partial(Arithmetic, streams=streams))
    return streams


@pytest.fixture
def model(served: Served, streams: FakeStreams, pressure: Pressure) -> Iterator[Any]:
    loaded: Any = load_model("tiny", "fused", served.socket, tier="gpu:0", graphs=True)
    with loaded.tierd:
        yield loaded


def generate(model: Any, ids: torch.Tensor = IDS, steps: int = STEPS, **more: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    settings |= {"eos_token_id": None, "cache_implementation": "static"}
    tokens: torch.Tensor = model.generate(ids, **settings | more)
    return tokens


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_generate_repeats_a_captured_pass_and_gives_the_same_tokens(
    model: Any, served: Served
) -> None:
    assert torch.equal(generate(model), served.tokens())
    statistics = model.tierd.statistics()
    # A prompt, a first token as usual, then replays alone.
    assert (statistics.captures, statistics.replays) == (1, STEPS - 2)
    assert model.tierd.graphs.refusal == ""
    assert statistics.entries == 3 * (LAYERS + 2), "the captured one entered layers too"
    assert statistics.fused_calls == (STEPS - 1) * PRODUCTS, "those of replays count"


def test_matrices_that_are_expanded_are_so_in_the_graph_too(
    served: Served, streams: FakeStreams, pressure: Pressure
) -> None:
    model: Any = load_model("tiny", "dense", served.socket, tier="gpu:0", graphs=True)
    with model.tierd:
        assert torch.equal(generate(model, steps=4), served.tokens(steps=4))
        statistics = model.tierd.statistics()
        assert (statistics.captures, statistics.replays) == (1, 2)
        wasted = statistics.expanded_ahead - statistics.used_ahead
        assert statistics.expansions == 4 * PRODUCTS + wasted
        assert statistics.scratch_bytes == 3 * 100 * 60 * 2, "two buffers, and the graph's"
        model.tierd.graphs.drop()
        gc.collect()
        assert model.tierd.statistics().scratch_bytes == 2 * 100 * 60 * 2


def test_the_next_prompt_uses_the_graph_of_the_last_one(model: Any, served: Served) -> None:
    generate(model)
    gc.collect()
    for ids in (IDS + 20, IDS.flip(1)):
        assert torch.equal(generate(model, ids), served.tokens(ids))
        gc.collect()
    assert model.tierd.statistics().captures == 1


def test_what_is_captured_is_for_its_shapes_only(model: Any, served: Served) -> None:
    generate(model)
    for ids in (IDS[:1], IDS[:, :4]):
        assert torch.equal(generate(model, ids), served.tokens(ids))
    assert model.tierd.statistics().captures == 2, "another batch; the cache stays as long"


def test_there_are_a_few_at_once_and_the_one_that_was_used_last_stays(
    model: Any, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierd_client.graphs.MOST_GRAPHS", 2)
    monkeypatch.setattr("tierd_client.graphs.PATIENCE", 0)
    for steps in (3, 4, 5):
        assert torch.equal(generate(model, IDS, steps), served.tokens(IDS, steps))
    graphs = model.tierd.graphs
    assert (graphs.captures, graphs.alive) == (3, 2)
    assert model.tierd.leases._holdings.users == 2 * len(set(model.tierd.leases.order))
    generate(model, IDS, 4)
    assert graphs.captures == 3


def decoded_in_turn(model: Any, caches: list[StaticCache], rounds: int) -> list[str]:
    """What the model says of each pass, a token for one cache after another; "" is a replay."""
    said = []
    with torch.no_grad():
        for _ in range(rounds):
            for cache in caches:
                model(IDS[:, :1], past_key_values=cache)
                said.append(model.tierd.graphs.refusal)
    return said


def test_more_caches_in_turn_than_graphs_do_not_take_each_others(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierd_client.graphs.MOST_GRAPHS", 2)
    monkeypatch.setattr("tierd_client.graphs.PATIENCE", 3)
    caches = [StaticCache(model.config, max_cache_len=20) for _ in range(3)]
    with torch.no_grad():
        for cache in caches:
            model(IDS[:, :2], past_key_values=cache)
    taken = TAKEN.format(most=2, patience=3)
    assert decoded_in_turn(model, caches, 1) == [NEW, "", ""]
    assert decoded_in_turn(model, caches, 6) == 6 * [taken, "", ""]
    assert model.tierd.graphs.captures == 2
    # One that rests is given up, for the one that was without, and that once.
    assert decoded_in_turn(model, caches[:2], 5) == 3 * [taken, ""] + 2 * ["", ""]
    assert model.tierd.graphs.captures == 3


def test_passes_in_turn_are_the_same_with_a_graph_and_without(
    model: Any, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierd_client.graphs.MOST_GRAPHS", 1)
    monkeypatch.setattr("tierd_client.graphs.PATIENCE", 1)
    caches = [StaticCache(model.config, max_cache_len=40) for _ in range(2)]
    theirs = [StaticCache(model.config, max_cache_len=40) for _ in range(2)]
    with torch.no_grad():
        for ids in (IDS, *(IDS[:, at : at + 1] for at in range(5))):
            # Twice at a time: the second pass takes the other cache's graph.
            for number in (0, 0, 1, 1):
                got = model(ids, past_key_values=caches[number]).logits
                expected = served.reference(ids, past_key_values=theirs[number]).logits
                assert torch.equal(got, expected)
    assert model.tierd.graphs.captures == 10


def test_a_cache_that_is_still_used_is_not_written_to_by_another(
    model: Any, served: Served
) -> None:
    first = generate(model, return_dict_in_generate=True)
    kept: Any = first.past_key_values  # type: ignore[attr-defined]
    before = [layer.keys.clone() for layer in kept.layers]
    assert torch.equal(generate(model, IDS + 20), served.tokens(IDS + 20))
    assert all(map(torch.equal, before, [layer.keys for layer in kept.layers]))
    assert model.tierd.statistics().captures == 2


def test_tensors_of_a_cache_that_were_replaced_are_seen(model: Any, served: Served) -> None:
    settings: dict[str, Any] = {"num_beams": 3}
    expected = generate(served.reference, **settings)
    assert torch.equal(generate(model, **settings), expected)
    assert model.tierd.statistics().replays > 0


def test_the_results_of_a_pass_stay_when_the_next_one_runs(model: Any, served: Served) -> None:
    cache = StaticCache(model.config, max_cache_len=20)
    theirs = StaticCache(model.config, max_cache_len=20)
    got, expected = [], []
    with torch.no_grad():
        for ids in (IDS, *(IDS[:, at : at + 1] for at in range(5))):
            got.append(model(ids, past_key_values=cache).logits)
            expected.append(served.reference(ids, past_key_values=theirs).logits)
    assert model.tierd.statistics().replays == 4
    assert all(map(torch.equal, got, expected))


def test_leases_are_held_while_a_graph_lives_and_go_back_when_memory_is_short(
    model: Any, served: Served, pressure: Pressure
) -> None:
    generate(model)
    leases = model.tierd.leases
    assert leases._holdings.users == len(set(leases.order))
    pressure.on = True
    wait_until(lambda: model.tierd.graphs.alive == 0)
    wait_until(lambda: not leases.opened.connection.held)
    assert model.tierd.graphs.refusal == PRESSED
    before = model.tierd.statistics()
    assert torch.equal(generate(model), served.tokens())
    after = model.tierd.statistics()
    assert (after.captures, after.replays) == (before.captures, before.replays)
    assert model.tierd.graphs.refusal == PRESSED
    pressure.on = False
    assert torch.equal(generate(model), served.tokens())
    assert model.tierd.statistics().captures == before.captures + 1


def test_memory_that_gets_short_between_two_tokens_is_noticed_at_once(
    model: Any, served: Served, pressure: Pressure
) -> None:
    cache = StaticCache(model.config, max_cache_len=20)
    theirs = StaticCache(model.config, max_cache_len=20)
    with torch.no_grad():
        for number, ids in enumerate((IDS, *(IDS[:, at : at + 1] for at in range(6)))):
            pressure.on = number == 4
            got = model(ids, past_key_values=cache).logits
            assert torch.equal(got, served.reference(ids, past_key_values=theirs).logits)
            if pressure.on:
                assert model.tierd.graphs.alive == 0
    assert (model.tierd.statistics().captures, model.tierd.statistics().replays) == (2, 3)


def test_a_slot_that_changed_under_a_graph_is_raised_once_and_never_replayed(
    model: Any, served: Served
) -> None:
    generate(model)
    hold = model.tierd.graphs._passes[0]._hold
    next(iter(hold._leases.values())).generation += 1
    with pytest.raises(LeaseLost, match=r"tiny/.* while a graph had it: .* void"):
        generate(model)
    assert model.tierd.graphs.alive == 0
    assert torch.equal(generate(model), served.tokens())


def test_what_a_gpu_found_wrong_in_a_replay_is_raised_by_a_later_one(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(model)
    cells = model.tierd._arithmetic._products._cells
    name = "model.layers.1.mlp.up_proj.weight"
    cells.cell(name, "").fill_(4 * 7 + 1)  # by the kernel, in the graph
    with pytest.raises(TensorCorrupt, match=rf"layers\.1, '{name}': tile 7: its head"):
        generate(model)
    assert model.tierd.graphs.alive == 0
    generate(model)


def test_another_stream_waits_for_all_that_was_given_to_the_last_one(
    model: Any, served: Served, streams: FakeStreams
) -> None:
    generate(model)
    gc.collect()
    first, other = streams.current(), FakeStream("other")
    passed = streams.event()
    passed.record(first)  # a pass without the graph, which used the cache too
    streams.use(other)
    assert torch.equal(generate(model, IDS + 20), served.tokens(IDS + 20))
    assert model.tierd.statistics().captures == 1
    mark = model.tierd.graphs._passes[0]._mark
    waited_ms = other.waited_ms[other.waited.index(mark)]
    assert waited_ms is not None
    assert passed.at_ms is not None
    assert waited_ms > passed.at_ms
    assert not mark.synchronized


def test_two_threads_decode_at_once(model: Any, served: Served) -> None:
    prompts = [IDS, IDS + 20]
    expected = [served.tokens(ids) for ids in prompts]
    got: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        for _ in range(3):
            got[number] = generate(model, prompts[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [torch.equal(got[number], expected[number]) for number in range(2)] == [True, True]
    assert model.tierd.statistics().replays > 0


def test_a_cache_that_grows_is_refused_with_what_to_do(model: Any) -> None:
    with pytest.raises(UnsupportedOperation, match='cache_implementation="static"'):
        generate(model, cache_implementation=None)
    assert generate(model, steps=1, cache_implementation=None).shape == (2, 7)


def test_a_pass_that_cannot_be_captured_is_refused_with_the_reason(model: Any) -> None:
    def look(module: Any, args: Any, output: Any) -> None:
        float(output.sum())  # waits for the GPU

    handle = model.model.norm.register_forward_hook(look)
    with pytest.raises(UnsupportedOperation, match=r"cannot be captured \(.*not permitted"):
        generate(model)
    handle.remove()
    assert model.tierd.leases._holdings.users == 0
    generate(model)


def test_torch_compile_and_graphs_are_refused_together(model: Any) -> None:
    with pytest.raises(UnsupportedOperation, match="compile_config is refused"):
        model.get_compiled_call(CompileConfig())
    assert model.get_compiled_call(None) == model.__call__


def test_graphs_on_the_cpu_are_refused(served: Served) -> None:
    with pytest.raises(UnsupportedDevice, match=r"graphs=True on cpu is refused: .*cuda"):
        load_model("tiny", socket=served.socket, graphs=True)


def test_a_model_that_is_closed_gives_all_back(model: Any) -> None:
    generate(model)
    connection = model.tierd.leases.opened.connection
    model.tierd.close()
    assert not connection.held
    with pytest.raises(ClientClosed):
        generate(model)


def test_a_model_whose_gpu_is_lost_ends_its_connection_all_the_same(
    model: Any, streams: FakeStreams
) -> None:
    generate(model)
    connection = model.tierd.leases.opened.connection

    def lost() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    for event in streams.events:
        event.synchronize = lost  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        model.tierd.close()
    assert not connection.alive


def test_why_nothing_was_repeated_is_said(model: Any) -> None:
    generate(model, steps=2)
    assert model.tierd.graphs.refusal == NEW
    assert model.tierd.statistics().replays == 0
