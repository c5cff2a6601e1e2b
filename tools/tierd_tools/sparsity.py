"""How sparse each weight is to become: a default, exceptions by name, and what is left alone.

A pattern is a glob (`*`, `?`, `[...]`, case matters) that covers the whole name of a tensor or of a
module around it: `model.layers.0` is all of layer 0 and nothing of layer 01, `*.down_proj` every
down projection, `model.layers.*.self_attn.q_proj.weight` single weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from shlex import quote
from typing import TYPE_CHECKING

from tierd_layouts.names import layer_of
from tierd_tools.errors import BadSetting

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: `.weight`s inside numbered layers that are no linear layers (T5's biases, for example)
_NOT_LINEAR = ("embed", "relative_attention_bias", "norm")
#: modules that choose the experts of an MoE layer: small, and a wrong choice costs a whole expert
_ROUTERS = frozenset(("gate", "router", "moe_gate", "shared_expert_gate", "wg"))


@dataclass(frozen=True, slots=True)
class Sparsities:
    """The share of zeros that each tensor is to have, by its name alone.

    default: of the linear weights in numbered layers, router gates excepted.
    exceptions: (pattern, share) instead of the default, for router gates too; the last one that
        matches counts.
    keep: patterns of tensors that no lossy step may touch, whatever else is said of them.
    """

    default: float = 0.0
    exceptions: tuple[tuple[str, float], ...] = ()
    keep: tuple[str, ...] = ()

    @classmethod
    def parse(
        cls,
        sparsity: float | None = None,
        sparsity_of: Sequence[str] = (),
        keep: Sequence[str] = (),
    ) -> Sparsities:
        """From what a user said; `sparsity_of` are texts `PATTERN=S`. Raises BadSetting."""
        if sparsity is not None:
            check_sparsity(sparsity)
        if "" in keep:
            raise BadSetting("keep '' is no pattern: a glob of tensor or module names is needed")
        exceptions = tuple(_exception(text) for text in sparsity_of)
        return cls(sparsity or 0.0, exceptions, tuple(keep))

    def of(self, tensor_name: str) -> float:
        """The share of zeros to prune to; 0.0: never pruned."""
        if not is_linear(tensor_name) or self.keeps(tensor_name):
            return 0.0
        for pattern, sparsity in reversed(self.exceptions):
            if matches(tensor_name, pattern):
                return sparsity
        return 0.0 if is_router(tensor_name) else self.default

    def keeps(self, tensor_name: str) -> bool:
        """Whether the tensor is to stay as it is: neither pruned nor quantised."""
        return any(matches(tensor_name, pattern) for pattern in self.keep)

    def refuse_unmatched(self, tensor_names: Iterable[str]) -> None:
        """Raises BadSetting for a pattern that means nothing here: it is a typing error."""
        names = list(tensor_names)
        linear = [name for name in names if is_linear(name)]
        for pattern, _ in self.exceptions:
            if not any(matches(name, pattern) for name in linear):
                raise BadSetting(
                    f"sparsity-of {pattern!r} matches none of the {len(linear)} linear weights in "
                    f"numbered layers{_for_example(linear)}"
                )
        for pattern in self.keep:
            if not any(matches(name, pattern) for name in names):
                raise BadSetting(
                    f"keep {pattern!r} matches none of the {len(names)} tensors"
                    f"{_for_example(names)}"
                )

    def text(self) -> str:
        """Canonical: equal texts mean equal shares for every name."""
        parts = [f"--sparsity {self.default!r}"] if self.default else []
        parts += [
            f"--sparsity-of {quote(f'{pattern}={share!r}')}" for pattern, share in self.exceptions
        ]
        return " ".join([*parts, *(f"--keep {quote(pattern)}" for pattern in self.keep)])


def check_sparsity(sparsity: float) -> None:
    """Raise BadSetting unless 0 <= sparsity < 1 (so NaN and infinity are refused too)."""
    if not 0.0 <= sparsity < 1.0:
        raise BadSetting(f"sparsity {sparsity} is outside [0, 1)")


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` covers the tensor `name` or a module that it is in."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def is_numbered(layer: str) -> bool:
    """Whether `layer` is one of a row of equal ones: `model.layers.3`, not `lm_head`."""
    segment = layer.rpartition(".")[2]
    return segment.isascii() and segment.isdigit()


def is_linear(tensor_name: str) -> bool:
    """Whether the name is that of a linear layer's weight in a numbered layer."""
    module, _, leaf = tensor_name.rpartition(".")
    name = module.rpartition(".")[2].lower()
    return (
        leaf == "weight"
        and is_numbered(layer_of(tensor_name))
        and not any(word in name for word in _NOT_LINEAR)
    )


def is_router(tensor_name: str) -> bool:
    """Whether the tensor is in the module that chooses the experts of an MoE layer."""
    inside = tensor_name[len(layer_of(tensor_name)) :].lower().split(".")
    return any(segment in _ROUTERS for segment in inside)


def _exception(text: str) -> tuple[str, float]:
    pattern, equals, share = text.rpartition("=")
    if not equals or not pattern:
        raise BadSetting(f"sparsity-of {text!r} is not PATTERN=S, for example '*.down_proj=0.6'")
    try:
        sparsity = float(share)
    except ValueError as error:
        raise BadSetting(f"sparsity-of {text!r}: {share!r} is not a number") from error
    if not 0.0 <= sparsity < 1.0:
        raise BadSetting(f"sparsity-of {text!r}: sparsity {sparsity} is outside [0, 1)")
    return pattern, sparsity


def _for_example(names: Sequence[str]) -> str:
    return f" (one of them is {names[len(names) // 2]!r})" if names else ""
