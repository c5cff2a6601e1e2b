"""What config.json says about compressed weights: taken out at import, put in at export.

It is never asked what a tensor is: writers are known that name a format and write dense tensors.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from tierd_tools.errors import CheckpointError, PackError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

QUANTIZATION = "quantization_config"
#: where releases before 0.6 kept it
_SECTIONS = (QUANTIZATION, "compression_config")
_METHOD = "compressed-tensors"
#: the last release that reads and writes the format
_VERSION = "0.14.0.1"


def without_compression(
    config: Mapping[str, Any], *, decoded: bool, where: str
) -> dict[str, Any] | None:
    """`config` of a model whose weights are ordinary ones now, or None where it is that already.

    decoded: the checkpoint had tensors in a bitmask format. Then every section on compression goes,
    whatever else it claims: there is no quantised tensor (`bitmask_import` saw to that). Without
    such tensors a section goes that claims sparsity and nothing else; it would not be true.
    Raises CheckpointError for sections that an ordinary model cannot do without.
    """
    found = {name: config[name] for name in _SECTIONS if isinstance(config.get(name), dict)}
    if decoded:
        for name, section in found.items():
            _refuse_what_is_needed(section, f"{where}: {name}")
    else:
        found = {name: section for name, section in found.items() if _claims_only_sparsity(section)}
    if not found:
        return None
    return {name: value for name, value in config.items() if name not in found}


def refuse_section(config: Mapping[str, Any], *, where: str) -> None:
    """Raises PackError when there is a section already: the weights are not ordinary ones."""
    for name in _SECTIONS:
        if name in config:
            raise PackError(f"{where} has a {name} already: this model can only be unpacked as is")


def with_sparsity(
    config: Mapping[str, Any], targets: Collection[str], sparsity: float
) -> dict[str, Any]:
    """`config` with the section that compressed-tensors 0.14 writes for `sparse-bitmask`.

    targets: the modules whose weights are compressed. sparsity: share of zeros of the whole model.
    """
    section = {
        "quant_method": _METHOD,
        "version": _VERSION,
        "sparsity_config": {
            "format": "sparse-bitmask",
            "global_sparsity": sparsity,
            "sparsity_structure": "unstructured",
            "targets": sorted(targets),
            "ignore": [],
            "registry_requires_subclass": False,
        },
        "transform_config": {},
    }
    return {**config, QUANTIZATION: section}


def target_patterns(compressed: Collection[str], modules: Collection[str]) -> list[str]:
    """Patterns, as compressed-tensors reads them, for the modules `compressed` of all `modules`.

    One for the modules that differ in numbers only, where all of those are compressed; otherwise a
    module's own name. A class (`Linear`) would be shorter, but a tensor does not tell it.
    """
    alike: dict[str, set[str]] = {}
    for module in modules:
        alike.setdefault(_pattern(module), set()).add(module)
    patterns: list[str] = []
    wanted = frozenset(compressed)
    for pattern, members in alike.items():
        if members <= wanted:
            patterns.append(pattern)
        else:
            patterns += members & wanted
    return sorted(patterns)


def config_text(config: Mapping[str, Any]) -> bytes:
    """config.json, laid out as transformers does."""
    return json.dumps(config, indent=2).encode() + b"\n"


def _pattern(module: str) -> str:
    parts = (r"\d+" if part.isdecimal() else re.escape(part) for part in module.split("."))
    return "re:" + r"\.".join(parts) + "$"


def _refuse_what_is_needed(section: Mapping[str, Any], where: str) -> None:
    method = section.get("quant_method", _METHOD)
    if method != _METHOD:
        raise CheckpointError(
            f"{where} says quant_method {method!r}, and there are weights of {_METHOD}: "
            "no model can be both"
        )
    if section.get("transform_config"):
        raise CheckpointError(
            f"{where} has a transform_config: the weights are transformed, and an ordinary model "
            "would not undo it"
        )


def _claims_only_sparsity(section: Mapping[str, Any]) -> bool:
    sparsity = section.get("sparsity_config")
    others = ("config_groups", "kv_cache_scheme", "transform_config")
    return (
        section.get("quant_method", _METHOD) == _METHOD
        and isinstance(sparsity, dict)
        and bool(sparsity)
        and not any(section.get(name) for name in others)
    )
