from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tierd_layouts.errors import FormatError, NameRefused
from tierd_layouts.names import (
    check_file_name,
    check_layer_name,
    check_model_name,
    check_tensor_name,
    layer_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("name", ["a", "Llama-3.1-8B", "0", "a_b.c-d", "x" * 128])
@pytest.mark.parametrize("check", [check_model_name, check_file_name])
def test_ordinary_names_are_allowed(check: Callable[[str], str], name: str) -> None:
    assert check(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a..b",
        "../a",
        "/etc",
        "a/b",
        "a\0",
        "a\n",
        ".hidden",
        "-rf",
        "_a",
        "x" * 129,
        "ä",
        "a b",
        "\ud800",
    ],
)
@pytest.mark.parametrize("check", [check_model_name, check_file_name])
def test_names_that_could_leave_their_folder_are_refused(
    check: Callable[[str], str], name: str
) -> None:
    with pytest.raises(NameRefused, match="is refused") as caught:
        check(name)
    assert isinstance(caught.value, FormatError)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "w", "größe", "a b"])
def test_tensor_names_are_those_of_checkpoints(name: str) -> None:
    assert check_tensor_name(name) == name
    assert check_layer_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "a/b", "a\\b", "a..b", "a\0b", "a\nb", "\x7f", "\ud800", "x" * 1025, "ä" * 513]
)
@pytest.mark.parametrize("check", [check_tensor_name, check_layer_name])
def test_tensor_and_layer_names_that_confuse_are_refused(
    check: Callable[[str], str], name: str
) -> None:
    with pytest.raises(NameRefused):
        check(name)


@pytest.mark.parametrize("name", ["__metadata__", "__pad__.0", "__pad__.x"])
def test_names_that_a_shard_reserves_are_refused(name: str) -> None:
    with pytest.raises(NameRefused, match="reserved"):
        check_tensor_name(name)


@pytest.mark.parametrize(
    ("parameter", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("model.layers.3.experts.7.w1.weight", "model.layers.3"),
        ("gpt_neox.layers.11.attention.dense.bias", "gpt_neox.layers.11"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("model.layers.3", "model.layers.3"),
        ("model.layer²3.weight", "model.layer²3"),
        ("model.²3.weight", "model.²3"),
        ("0.weight", "0"),
        ("weight", "weight"),
    ],
)
def test_a_parameter_belongs_to_its_numbered_block_or_its_parent(
    parameter: str, layer: str
) -> None:
    assert layer_of(parameter) == layer
