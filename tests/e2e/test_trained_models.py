"""Trained models on leases write what they write in memory, from one layer's memory too."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.e2e.both_sides import daemon_of, in_memory
from tests.e2e.product_bounds import capture, check_products
from tierd_client.client import Client
from tierd_client.load import load_model, load_tokenizer
from tierd_layouts.container import open_pack
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("two_threads")

GRANULE_BYTES = 2 << 20
TRAINED = Path(__file__).resolve().parents[3] / "shared" / "models"
TRAINED_MODELS = ("stdlib-llama-12m", "stdlib-opt-12m")


def trained(name: str) -> Path:
    folder = TRAINED / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"trained model {name} is not in ../shared/models")
    return folder


@dataclass(frozen=True)
class Trained:
    name: str
    reference: Any
    socket: str
    text: str


@pytest.fixture(scope="module", params=TRAINED_MODELS)
def trained_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trained]:
    """Served with hardly more than one layer's memory: layers are read again and again."""
    source = trained(request.param)
    folder = tmp_path_factory.mktemp("trained")
    pack(source, folder / "packs" / source.name, prune="magnitude", sparsity=0.5)
    unpack(folder / "packs" / source.name, folder / "reference")
    reference = in_memory(folder / "reference")
    text = (TRAINED / "dev.txt").read_text()[:4000]
    largest = max(layer.nbytes for layer in open_pack(folder / "packs" / source.name).layers)
    granules = -(-largest // GRANULE_BYTES) + 1  # a layer may start inside one
    with daemon_of(folder / "packs", str(granules * GRANULE_BYTES)) as socket:
        yield Trained(source.name, reference, socket, text)


def tokens_of(trained_model: Trained, count: int) -> torch.Tensor:
    tokenizer = load_tokenizer(trained_model.name, socket=trained_model.socket)
    ids: torch.Tensor = tokenizer(trained_model.text, return_tensors="pt")["input_ids"]
    return ids[:, :count]


def test_a_trained_model_writes_the_same_text_from_one_layers_memory(
    trained_model: Trained,
) -> None:
    ids = tokens_of(trained_model, 48)
    model: Any = load_model(trained_model.name, compute="dense", socket=trained_model.socket)
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    settings |= {"max_new_tokens": 12, "output_logits": True, "return_dict_in_generate": True}
    with model.tierd, torch.no_grad():
        expected = trained_model.reference.generate(ids, **settings)
        got = model.generate(ids, **settings)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))
    with Client(trained_model.socket) as client:
        status = client.ask("status")
    assert status["scheduler"]["evictions"] > 0, "the budget held everything: nothing was shown"
    assert status["dram"]["peak_bytes"] <= status["dram"]["budget_bytes"]


def test_threads_of_a_trained_model_share_what_its_client_was_granted(
    trained_model: Trained,
) -> None:
    # Out of step they want more layers than the daemon reserved: it refuses, and one waits.
    ids = tokens_of(trained_model, 60)
    model: Any = load_model(trained_model.name, compute="dense", socket=trained_model.socket)
    parts = [ids[:, :7], ids[:, 7:20], ids[:, 20:60]]
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    got: dict[int, torch.Tensor] = {}

    def run(number: int) -> None:
        mask = torch.ones_like(parts[number])
        got[number] = model.generate(parts[number], attention_mask=mask, **settings)

    with model.tierd:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
    for number, part in enumerate(parts):
        mask = torch.ones_like(part)
        expected = trained_model.reference.generate(part, attention_mask=mask, **settings)
        assert torch.equal(got[number], expected)


def test_fused_products_of_real_activations_stay_in_their_bounds(trained_model: Trained) -> None:
    inputs = capture(trained_model.reference, tokens_of(trained_model, 24))
    checked = check_products(trained_model.socket, trained_model.name, inputs)
    assert checked >= 24
    largest = max(float(x.abs().max() / x.float().square().mean().sqrt()) for x in inputs.values())
    assert largest > 15, "no outliers among these activations"
