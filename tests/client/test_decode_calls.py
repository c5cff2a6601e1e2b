from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig, StaticCache

from tierd_client.decode_calls import cache_form, decode_call
from tierd_client.errors import UnsupportedOperation

SIZES: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}


def filled(cache: Any, tokens: int = 3, rows: int = 2) -> Any:
    for layer in range(2):
        cache.update(torch.ones(rows, 2, tokens, 4), torch.ones(rows, 2, tokens, 4), layer)
    return cache


def static(length: int = 9) -> Any:
    return StaticCache(LlamaConfig(**SIZES), max_cache_len=length)


def arguments(cache: Any = None, tokens: int = 1, **others: Any) -> dict[str, Any]:
    ids = torch.zeros(2, tokens, dtype=torch.long)
    return {"input_ids": ids, "past_key_values": cache, "use_cache": True, **others}


def test_a_token_of_each_row_into_a_filled_static_cache_is_decoding() -> None:
    cache = filled(static())
    found = decode_call(arguments(cache, attention_mask=torch.ones(2, 1, 1, 9)))
    assert found is not None
    assert found.cache is cache
    assert set(found.tensors) == {"input_ids", "attention_mask"}
    assert found.others == {"use_cache": True}


@pytest.mark.parametrize(
    "call",
    [
        arguments(),
        arguments(filled(static()), tokens=2),
        arguments(static()),
        arguments(DynamicCache()),
        arguments(filled(DynamicCache()), tokens=5),
        {"past_key_values": filled(static())},
    ],
    ids=["no cache", "a prompt", "empty", "empty and growing", "growing prompt", "no input"],
)
def test_anything_else_is_none(call: dict[str, Any]) -> None:
    assert decode_call(call) is None


def test_a_cache_that_grows_is_refused_with_what_to_do() -> None:
    with pytest.raises(UnsupportedOperation, match=r'DynamicCache.*cache_implementation="static"'):
        decode_call(arguments(filled(DynamicCache())))


def test_a_static_cache_that_counts_on_the_host_is_refused() -> None:
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
    cache = StaticCache(config, max_cache_len=9)
    with pytest.raises(UnsupportedOperation, match="StaticSlidingWindowLayer counts on the host"):
        decode_call(arguments(cache))
    offloading = static()
    offloading.offloading = True
    with pytest.raises(UnsupportedOperation, match="offloading counts on the host"):
        decode_call(arguments(offloading))


def test_what_may_hide_tensors_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedOperation, match="argument position_embeddings is a tuple"):
        decode_call(arguments(filled(static()), position_embeddings=(torch.ones(1),)))


def test_calls_of_one_kind_have_one_key() -> None:
    def key(cache: Any, attention: str = "sdpa", **others: Any) -> Any:
        found = decode_call(arguments(cache, **others), attention)
        assert found is not None
        return found.key

    cache = filled(static())
    same = key(cache, attention_mask=torch.ones(2, 9))
    assert same == key(filled(static()), attention_mask=torch.zeros(2, 9))
    with torch.inference_mode():
        inside = key(cache, attention_mask=torch.ones(2, 9))
    different = [
        key(cache),
        key(cache, attention_mask=torch.ones(2, 8)),
        key(cache, attention_mask=torch.ones(2, 9).bool()),
        key(cache, attention_mask=torch.ones(2, 9), output_attentions=True),
        key(cache, "eager", attention_mask=torch.ones(2, 9)),
        inside,
    ]
    assert same not in different
    assert len(set(different)) == len(different)


def test_the_form_of_a_cache_is_all_that_its_tensors_are_but_their_contents() -> None:
    form = cache_form(filled(static()))
    assert form == cache_form(filled(static(), tokens=1))
    assert form != cache_form(filled(static(10)))
    assert form != cache_form(filled(static(), rows=1))
