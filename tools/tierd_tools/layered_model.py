"""A checkpoint's model without its weights, run one decoder layer at a time.

No code per model class: the model is made as `tierd_client.load_model` makes it, from placeholders,
and its own forward is run for every layer again. The layers before the one at hand answer with the
output that is known already, so whatever the model does before and between its layers (masks,
positions, a sliding window in every other layer) is its own; the layer at hand computes, and what
comes after it is never reached. Weights outside the layers (embeddings) are read when their module
is first called, and stay.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import nn

from tierd_client import progress_bars
from tierd_client.errors import UnsupportedModel
from tierd_client.names import Stored, check_loaded, map_checkpoint, placeholders
from tierd_client.tensors import torch_dtype
from tierd_layouts.names import layer_of
from tierd_tools.errors import CalibrationError
from tierd_tools.sparsity import is_numbered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tierd_tools.checkpoint import Checkpoint, SourceTensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of the checkpoint belongs; `empty` is there while it is not loaded."""

    source: SourceTensor
    module: nn.Module
    attribute: str
    empty: torch.Tensor

    def load(self) -> None:
        """Read it, converted as transformers' loader would."""
        data = torch.from_numpy(self.source.read()).view(torch_dtype(self.source.dtype))
        self.put(data.reshape(self.source.shape).to(self.empty.dtype))

    def put(self, tensor: torch.Tensor) -> None:
        if self.attribute in self.module._buffers:
            self.module._buffers[self.attribute] = tensor
        else:
            self.module._parameters[self.attribute] = nn.Parameter(tensor, requires_grad=False)

    def free(self) -> None:
        self.put(self.empty)

    @property
    def linear(self) -> bool:
        """Whether it is the weight of an nn.Linear."""
        return isinstance(self.module, nn.Linear) and self.attribute == "weight"


class LayeredModel:
    """The causal LM in a checkpoint's folder. Raises CalibrationError for what it cannot run.

    layers: for each decoder layer, in order, the places of its tensors; linears: checkpoint name ->
    place of those that are the weight of an nn.Linear in a decoder layer.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._model, mapping = _empty_model(checkpoint)
        self.kind = type(self._model).__name__
        places = _places(self._model, mapping)
        container = self._container(places)
        self._modules = list(self._model.get_submodule(container))
        self.layers: list[list[Place]] = [[] for _ in self._modules]
        for name, place in places.items():
            if layer_of(name).rpartition(".")[0] == container:
                self.layers[int(name[len(container) + 1 :].split(".")[0])].append(place)
            else:
                _load_when_called(place)
        self.linears = {p.source.name: p for layer in self.layers for p in layer if p.linear}
        config = self._model.config.get_text_config()
        #: the longest window that the model takes; None: the config does not say
        self.max_tokens: int | None = getattr(config, "max_position_embeddings", None)

    def _container(self, places: Mapping[str, Place]) -> str:
        """The path of the one nn.ModuleList that holds all decoder layers."""
        groups = {layer_of(name) for name, place in places.items() if place.linear}
        found = sorted({group.rpartition(".")[0] for group in groups if is_numbered(group)})
        if len(found) != 1 or not isinstance(self._model.get_submodule(found[0]), nn.ModuleList):
            raise CalibrationError(
                f"{self.kind} has its linear layers in {', '.join(found) or 'no numbered layers'}; "
                "only a model with one list of decoder layers can be calibrated"
            )
        return found[0]

    @contextmanager
    def loaded(self, number: int) -> Iterator[list[Place]]:
        """The tensors of decoder layer `number` are in memory inside this context."""
        layer = self.layers[number]
        try:
            for place in layer:
                place.load()
            yield layer
        finally:
            for place in layer:
                place.free()

    def output_of(self, number: int, ids: torch.Tensor, before: Any) -> Any:
        """What layer `number`, which is loaded, returns. ids: int64[rows, tokens].

        before: what layer `number - 1` returned for these ids; of no use for layer 0.
        Raises CalibrationError when the model does not come to its layers in their order.
        """

        def answer(*args: Any, **kwargs: Any) -> Any:
            return before

        def stop(module: nn.Module, args: Any, output: Any) -> NoReturn:
            raise _Reached(output)

        skipped = self._modules[:number]
        handles = [
            self._modules[number].register_forward_hook(stop),
            *(m.register_forward_pre_hook(self._refuse_order) for m in self._modules[number + 1 :]),
        ]
        try:
            for module in skipped:
                vars(module)["forward"] = answer
            self._model(input_ids=ids, use_cache=False)
        except _Reached as reached:
            return reached.output
        except CalibrationError:
            raise
        except RuntimeError as error:  # torch, of weights that are not loaded: on the meta device
            raise CalibrationError(
                f"{self.kind} cannot be run up to its decoder layer {number} alone: {error}"
            ) from error
        finally:
            for module in skipped:
                vars(module).pop("forward", None)
            for handle in handles:
                handle.remove()
        raise CalibrationError(f"{self.kind} does not call its decoder layer {number}")

    def _refuse_order(self, module: nn.Module, args: Any) -> NoReturn:
        raise CalibrationError(f"{self.kind} does not call its decoder layers in their order")


class _Reached(Exception):
    """No error: the way out of a forward pass that has come far enough."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _empty_model(checkpoint: Checkpoint) -> tuple[Any, dict[str, Stored]]:
    """The model in evaluation mode, on placeholders, and the source of each of its names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path: Path = checkpoint.path
    # The client's functions look at name, dtype and shape only, which a SourceTensor has too.
    stored = {name: Stored(0, cast("Any", tensor)) for name, tensor in checkpoint.tensors.items()}
    made = placeholders(stored)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        if config.dtype is None:
            config.dtype = next(t.dtype for t in made.values() if t.is_floating_point())
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        mapping = map_checkpoint(skeleton, stored)
        with progress_bars.left_out():
            model, info = type(skeleton).from_pretrained(
                None, config=config, state_dict=made, dtype=config.dtype, output_loading_info=True
            )
        check_loaded(model, info, mapping, made)
    except UnsupportedModel as error:
        raise CalibrationError(f"{path}: {error}") from error
    except (ValueError, KeyError, OSError) as error:
        raise CalibrationError(f"{path}: no causal LM of transformers: {error}") from error
    return model.eval(), mapping


def _places(model: Any, mapping: Mapping[str, Stored]) -> dict[str, Place]:
    """By the model's names; the placeholders become meta tensors, which nothing can compute with.

    A tied weight has a place in every module that uses it.
    """
    # Tied parameters are one object under several names, of which the checkpoint may have one.
    source_of = {
        id(model.get_parameter_or_buffer(name)): cast("SourceTensor", stored.tensor)
        for name, stored in mapping.items()
    }
    places: dict[str, Place] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        source = source_of.get(id(tensor))
        if source is not None:
            path, _, attribute = name.rpartition(".")
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            places[name] = Place(source, model.get_submodule(path), attribute, empty)
    for place in places.values():
        place.free()
    return places


def _load_when_called(place: Place) -> None:
    handle: Any = None

    def load(module: nn.Module, args: Any) -> None:
        place.load()
        handle.remove()

    register: Callable[..., Any] = place.module.register_forward_pre_hook
    handle = register(load)
