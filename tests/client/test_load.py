"""`load_model` as users meet it: a real pack, a real daemon, a model of transformers."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import shutil
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from tests.client.small_checkpoints import IDS, SIZES, save
from tierd_client import load_model, load_tokenizer
from tierd_client.errors import (
    ClientClosed,
    DaemonGone,
    DaemonNotRunning,
    ForkedClient,
    ModelNotFound,
    PackInvalid,
    UnsupportedModel,
    UnsupportedOperation,
)
from tierd_client.private_daemon import start
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class Tiny:
    """A small pruned Llama: checkpoint, pack, and a daemon that serves it as `tiny`."""

    source: Path
    pack: Path
    socket: str

    def load(self, compute: str = "dense") -> Any:
        return load_model("tiny", compute=compute, socket=self.socket)

    def in_memory(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    folder = tmp_path_factory.mktemp("load")
    save(LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True), folder / "source")
    GenerationConfig(temperature=0.5, top_k=7, do_sample=True).save_pretrained(folder / "source")
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    fast.save_pretrained(folder / "source")
    pack(folder / "source", folder / "tiny", prune="magnitude", sparsity=0.5)
    unpack(folder / "tiny", folder / "reference")
    with start(folder / "tiny", "64MiB") as daemon:
        yield Tiny(folder / "reference", folder / "tiny", daemon.socket)


@pytest.fixture
def model(tiny: Tiny) -> Iterator[Any]:
    loaded = tiny.load()
    yield loaded
    loaded.tierd.close()


def real_bytes(model: Any) -> int:
    """Private memory of all parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.untyped_storage().nbytes() for t in tensors if t.device.type != "meta")


# ------------------------------------------------------------------------------------ what it gives


def test_loading_prints_nothing(
    tiny: Tiny, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with tiny.load().tierd:
        assert capfd.readouterr() == ("", "")
        assert not caplog.records


def test_weights_stay_in_the_arena_and_vectors_are_copied(model: Any) -> None:
    model(IDS)
    norms = (2 * 3 + 1) * 60 * 2
    rotary = 2 * 10 * 4
    assert real_bytes(model) == norms + rotary
    statistics = model.tierd.statistics()
    assert statistics.copied_bytes == norms
    assert statistics.scratch_bytes == 100 * 60 * 2
    assert statistics.expansions == 3 * 7
    assert statistics.stall_ns > 0


def test_the_model_is_ready_for_inference(model: Any, tiny: Tiny) -> None:
    reference = tiny.in_memory()
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.device == torch.device("cpu") == model.model.device
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == reference.num_parameters()
    assert isinstance(model, type(reference))
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.generation_config.to_dict() == reference.generation_config.to_dict()
    assert model.generation_config.top_k == 7
    assert model.name_or_path == "tiny"
    assert model.eval() is model


def test_hidden_states_and_attentions_come_out_as_usual(model: Any, tiny: Tiny) -> None:
    reference = tiny.in_memory()
    reference.set_attn_implementation("eager")
    model.set_attn_implementation("eager")
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected, got = reference(IDS, **wanted), model(IDS, **wanted)
    for name in ("hidden_states", "attentions"):
        assert len(expected[name]) > 0
        assert len(got[name]) == len(expected[name])
        assert all(map(torch.equal, got[name], expected[name]))


def test_beams_and_a_batch_with_padding_give_the_same_tokens(model: Any, tiny: Tiny) -> None:
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    settings: dict[str, Any] = {"attention_mask": mask, "num_beams": 3, "do_sample": False}
    settings |= {"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None, "top_k": None}
    settings |= {"temperature": None}
    expected = tiny.in_memory().generate(IDS, **settings)
    assert torch.equal(model.generate(IDS, **settings), expected)


def test_the_order_of_use_is_learned_where_modules_say_otherwise(tmp_path: Path) -> None:
    # OPT registers project_out before its layers and uses it after them.
    sizes = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    save(OPTConfig(**sizes, ffn_dim=100, word_embed_proj_dim=20), tmp_path / "source")
    pack(tmp_path / "source", tmp_path / "opt")
    model: Any = load_model(tmp_path / "opt", compute="dense")
    with model.tierd:
        names = [layer.name.split(".")[-1] for layer in model.tierd.leases.opened.index.layers]

        def order() -> list[str]:
            return [names[layer] for layer in model.tierd.leases.order]

        assert order().index("project_out") < order().index("0")
        model(IDS)
        ends = ["embed_tokens", "embed_positions", "project_in", "0", "1", "2", "project_out"]
        assert order() == [*ends, "embed_tokens"]
        before = model.tierd.statistics()
        model(IDS)
        after = model.tierd.statistics()
        known = after.ahead + after.kept - before.ahead - before.kept
        assert known == after.entries - before.entries == 8


def test_two_threads_generate_at_once(model: Any, tiny: Tiny) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    settings |= {"pad_token_id": 0, "top_k": None, "temperature": None}
    prompts = [IDS[:1], IDS[1:, 3:]]
    reference = tiny.in_memory()
    expected = [reference.generate(ids, **settings) for ids in prompts]
    got: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        got[number] = model.generate(prompts[number], **settings)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [torch.equal(got[number], expected[number]) for number in range(2)] == [True, True]


def test_an_interrupted_pass_leaves_the_model_usable(model: Any) -> None:
    expected = model(IDS).logits

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    handle.remove()
    assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(IndexError):
        model(torch.tensor([[1000]]))
    assert torch.equal(model(IDS).logits, expected)


def test_tokenizers_come_from_the_daemon_or_the_pack(tiny: Tiny) -> None:
    for tokenizer in (load_tokenizer("tiny", socket=tiny.socket), load_tokenizer(tiny.pack)):
        assert tokenizer("b")["input_ids"] == [1]


# ---------------------------------------------------------------------------------- what it refuses

OPERATIONS: dict[str, Any] = {
    "to": lambda model: model.to(torch.float32),
    "to cpu": lambda model: model.to("cpu"),
    "cuda": lambda model: model.cuda(),
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "bfloat16": lambda model: model.bfloat16(),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "inner to": lambda model: model.model.to(torch.float32),
    "layer to": lambda model: model.model.layers[0].to(torch.float32),
    "save_pretrained": lambda model: model.save_pretrained("never"),
    "inner save_pretrained": lambda model: model.model.save_pretrained("never"),
    "push_to_hub": lambda model: model.push_to_hub("never"),
    "state_dict": lambda model: model.state_dict(),
    "load_state_dict": lambda model: model.load_state_dict({}),
    "resize": lambda model: model.resize_token_embeddings(5),
    "train": lambda model: model.train(),
    "requires_grad_": lambda model: model.requires_grad_(),
    "deepcopy": copy.deepcopy,
    "deepcopy of a layer": lambda model: copy.deepcopy(model.model.layers[0]),
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_would_move_copy_or_change_weights_is_refused(model: Any, operation: str) -> None:
    with pytest.raises(UnsupportedOperation, match=r"refused: .*share"):
        OPERATIONS[operation](model)
    assert model(IDS).logits.shape == (2, 15, 90)


def test_inputs_that_want_a_gradient_are_refused(model: Any) -> None:
    embeds = torch.zeros(1, 2, 60, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(UnsupportedOperation, match="no_grad"):
        model(inputs_embeds=embeds)


def test_an_unknown_way_to_compute_is_refused() -> None:
    with pytest.raises(ValueError, match="compute 'sparse' is unknown: dense, fused"):
        load_model("tiny", compute="sparse")


def refused(source: Path, tmp_path: Path) -> str:
    pack(source, tmp_path / "refused")
    with pytest.raises(UnsupportedModel) as caught:
        load_model(tmp_path / "refused")
    return str(caught.value)


def test_weights_that_are_no_linear_are_refused_with_the_list(tmp_path: Path) -> None:
    save(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50), tmp_path / "source")
    text = refused(tmp_path / "source", tmp_path)
    assert "transformer.h.*.attn.c_attn.weight (Conv1D" in text
    assert "(x2)" in text


def test_mixtures_of_experts_are_refused_with_the_list(tmp_path: Path) -> None:
    save(MixtralConfig(**SIZES, num_local_experts=2, num_key_value_heads=1), tmp_path / "source")
    assert "mixture-of-experts" in refused(tmp_path / "source", tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model_type": "nobody-knows"}, "no causal LM of transformers.*nobody-knows"),
        ({"model_type": ["llama"]}, "no causal LM of transformers"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
        ({"num_hidden_layers": 4}, r"misses 9 \(model.layers.3"),
        ({"num_hidden_layers": 2}, r"has no place for 9 \(model.layers.2"),
        ({"dtype": "float32"}, "BF16, the model torch.float32"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tiny: Tiny, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    folder = tmp_path / "pack"
    folder.mkdir()
    for path in tiny.pack.iterdir():
        if path.name != "config.json":
            os.link(path, folder / path.name)
    config = json.loads((tiny.pack / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match=f"(?s){text}"):
        load_model(folder)


def test_control_files_that_cannot_be_used_are_named(tiny: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.pack, tmp_path / "pack"))
    for name in ("generation_config.json", "tokenizer.json"):
        (folder / name).write_text("{")
    with pytest.raises(UnsupportedModel, match=r"pack: generation_config\.json cannot be used: "):
        load_model(folder)
    with pytest.raises(UnsupportedModel, match="pack: its tokenizer cannot be loaded: "):
        load_tokenizer(folder)


def test_a_model_that_nobody_serves_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="nobody"):
        load_model("nobody", socket=tiny.socket)
    for name in ("tiny", tiny.pack):  # of a daemon that was named no other is started in place
        with pytest.raises(DaemonNotRunning):
            load_model(name, socket=str(tmp_path / "no.sock"))


@pytest.mark.parametrize("name", ["reference", "absent/pack"])
def test_a_folder_that_is_no_pack_is_refused(tiny: Tiny, name: str) -> None:
    with pytest.raises(PackInvalid, match=r"no tierd.json"):
        load_model(tiny.source.parent / name)


# ------------------------------------------------------------------------------------ how it ends


def daemons_of(parent: int) -> set[int]:
    """Private daemons that this process started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return {
        int(pid)
        for pid in children
        if "private_launcher" in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    }


def test_a_pack_without_a_daemon_gets_a_private_one_until_the_close(tiny: Tiny) -> None:
    before = daemons_of(os.getpid())
    model: Any = load_model(tiny.pack)
    (private,) = daemons_of(os.getpid()) - before
    assert private
    with model.tierd:
        model(IDS)
    assert daemons_of(os.getpid()) == before
    with pytest.raises(ClientClosed, match="tiny"):
        model(IDS)


def test_a_private_daemon_goes_with_the_last_reference_to_its_model(tiny: Tiny) -> None:
    before = daemons_of(os.getpid())
    model: Any = load_model(tiny.pack)
    model(IDS)
    del model
    gc.collect()
    assert daemons_of(os.getpid()) == before


def test_a_daemon_that_serves_the_same_pack_is_used(tiny: Tiny) -> None:
    before = daemons_of(os.getpid())
    model: Any = load_model(tiny.pack, socket=tiny.socket)
    with model.tierd:
        assert daemons_of(os.getpid()) == before
        model(IDS)


def test_a_daemon_that_serves_another_pack_of_that_name_is_not_used(
    tiny: Tiny, tmp_path: Path
) -> None:
    pack(tiny.source, tmp_path / "tiny", prune="magnitude", sparsity=0.9)
    before = daemons_of(os.getpid())
    model: Any = load_model(tmp_path / "tiny", socket=tiny.socket)
    with model.tierd:
        assert len(daemons_of(os.getpid()) - before) == 1


def test_a_failed_load_leaves_no_daemon_behind(tmp_path: Path) -> None:
    before = daemons_of(os.getpid())
    save(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50), tmp_path / "source")
    refused(tmp_path / "source", tmp_path)
    assert daemons_of(os.getpid()) == before


def run_for(model: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        model(IDS)


def test_a_daemon_that_dies_is_noticed_at_the_next_pass(tiny: Tiny) -> None:
    before = daemons_of(os.getpid())
    model: Any = load_model(tiny.pack)
    model(IDS)
    (private,) = daemons_of(os.getpid()) - before
    os.kill(private, signal.SIGKILL)
    began = time.monotonic()
    while daemons_of(os.getpid()) - before:
        assert time.monotonic() - began < 20
        time.sleep(0.01)
    with pytest.raises(DaemonGone):  # a pass may begin while the thread beside it looks
        run_for(model, seconds=20)
    assert time.monotonic() - began < 40
    model.tierd.close()


def test_a_forked_child_is_refused_and_the_parent_goes_on(tiny: Tiny) -> None:
    model: Any = load_model(tiny.pack)
    expected = model(IDS).logits
    child = os.fork()
    if child == 0:
        status = 1
        try:
            model(IDS)
        except ForkedClient:
            model.tierd.close()  # must not end the parent's daemon
            status = 7
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with model.tierd:
        assert torch.equal(model(IDS).logits, expected)


def test_a_config_is_not_changed_by_being_served(tiny: Tiny, model: Any) -> None:
    config = AutoConfig.from_pretrained(tiny.source).to_dict()
    assert {**model.config.to_dict(), "_name_or_path": None} == {**config, "_name_or_path": None}
