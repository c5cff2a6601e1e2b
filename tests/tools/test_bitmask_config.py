from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tierd_tools.bitmask_config import (
    config_text,
    refuse_section,
    target_patterns,
    with_sparsity,
    without_compression,
)
from tierd_tools.errors import CheckpointError, PackError

SPARSITY = {"format": "sparse-bitmask", "targets": ["Linear"]}
GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}}
OTHERS = {"z": 1e-05, "model_type": "llama", "text": "ä\n", "nested": {"quantization_config": 1}}


@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "compressed-tensors", "sparsity_config": SPARSITY},
        {"sparsity_config": SPARSITY, "transform_config": {}, "config_groups": {}},
        {"sparsity_config": {}, "config_groups": GROUPS, "quantization_status": "frozen"},
        {},
    ],
)
def test_a_decoded_checkpoint_loses_its_section_and_nothing_else(
    name: str, section: dict[str, Any]
) -> None:
    config = {"a": 1, name: section, **OTHERS}
    found = without_compression(config, decoded=True, where="config.json")
    assert found == {"a": 1, **OTHERS}
    assert list(found) == ["a", *OTHERS]
    assert json.loads(config_text(found)) == found


def test_both_sections_go() -> None:
    config = {"quantization_config": {}, "compression_config": {}, "a": 1}
    assert without_compression(config, decoded=True, where="config.json") == {"a": 1}


def test_a_config_without_sections_is_left_as_it_is() -> None:
    for config in ({}, OTHERS, {"quantization_config": None}, {"quantization_config": "x"}):
        assert without_compression(config, decoded=True, where="config.json") is None
        assert without_compression(config, decoded=False, where="config.json") is None


def test_dense_tensors_lose_a_section_that_claims_sparsity_alone() -> None:
    section = {"quant_method": "compressed-tensors", "sparsity_config": SPARSITY}
    config = {"quantization_config": section, "a": 1}
    assert without_compression(config, decoded=False, where="config.json") == {"a": 1}


@pytest.mark.parametrize(
    "section",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "gptq", "sparsity_config": SPARSITY},
        {"quant_method": "compressed-tensors", "config_groups": GROUPS},
        {"sparsity_config": SPARSITY, "config_groups": GROUPS},
        {"sparsity_config": SPARSITY, "transform_config": {"config_groups": {"R1": {}}}},
        {"sparsity_config": {}},
    ],
)
def test_a_section_that_dense_tensors_may_need_stays(section: dict[str, Any]) -> None:
    config = {"quantization_config": section}
    assert without_compression(config, decoded=False, where="config.json") is None


def test_a_section_of_another_method_is_refused_beside_compressed_weights() -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    with pytest.raises(CheckpointError, match=r"m/config\.json: quantization_config .* 'gptq'"):
        without_compression(config, decoded=True, where="m/config.json")


def test_transformed_weights_are_refused() -> None:
    section = {"sparsity_config": SPARSITY, "transform_config": {"config_groups": {"R1": {}}}}
    with pytest.raises(CheckpointError, match=r"transform_config: the weights are transformed"):
        without_compression({"quantization_config": section}, decoded=True, where="config.json")


def test_an_exported_config_says_what_the_reference_writer_says() -> None:
    found = with_sparsity(OTHERS, ["b", "a"], 0.25)
    assert found == OTHERS | {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "version": "0.14.0.1",
            "sparsity_config": {
                "format": "sparse-bitmask",
                "global_sparsity": 0.25,
                "sparsity_structure": "unstructured",
                "targets": ["a", "b"],
                "ignore": [],
                "registry_requires_subclass": False,
            },
            "transform_config": {},
        }
    }


@pytest.mark.parametrize("name", ["quantization_config", "compression_config"])
def test_a_config_that_has_a_section_is_not_exported(name: str) -> None:
    with pytest.raises(PackError, match=rf"p/config\.json has a {name} already"):
        refuse_section({name: {}}, where="p/config.json")


def test_modules_that_differ_in_numbers_share_a_pattern_where_all_are_compressed() -> None:
    modules = [f"m.layers.{i}.{part}" for i in range(12) for part in ("up", "gate", "norm")]
    modules += ["head.up", "mxlayers.1.up"]
    compressed = [name for name in modules if name.startswith("m.") and name.endswith("up")]
    compressed += ["m.layers.3.gate", "m.layers.11.gate"]
    found = target_patterns(compressed, modules)
    assert found == ["m.layers.11.gate", "m.layers.3.gate", r"re:m\.layers\.\d+\.up$"]
    # As compressed-tensors 0.14.0.1 reads them: utils/match.py
    matched = [
        name
        for name in modules
        if any(
            re.match(target[3:], name) if target.startswith("re:") else name == target
            for target in found
        )
    ]
    assert sorted(matched) == sorted(compressed)
