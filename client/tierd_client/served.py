"""A transformers model whose weights belong to tierd: what it adds, and what it refuses."""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch  # noqa: TC002  # transformers evaluates annotations of its models' classes

from tierd_client import fork
from tierd_client.errors import UnsupportedOperation

if TYPE_CHECKING:
    from collections.abc import Callable

    from tierd_client.attendant import Attendant
    from tierd_client.compute import Arithmetic, Compute
    from tierd_client.graphs import Graphs
    from tierd_client.leasing import LayerLeases
    from tierd_client.modules import Site


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """What a model's forward passes have cost since it was loaded, over all threads.

    entries: layers entered; leases: of them, those that asked the daemon; ahead: of these, those
    that were asked ahead; kept: entries for which the lease was kept since an earlier one;
    stall_ns: time that entries waited. expansions, expand_ns: packed matrices expanded whole into
    scratch, of them expanded_ahead on a GPU before they were asked for, used_ahead of these not in
    vain; fused_calls, fused_ns: multiplied without it; blocked_calls, blocked_ns: multiplied a
    block at a time, expanding included.
    captures: graphs that were made; replays: passes that were done by one, which enter no layer.
    copied_bytes (norms, biases) and scratch_bytes are the model's own memory beside the arena.
    """

    entries: int
    leases: int
    ahead: int
    kept: int
    stall_ns: int
    expansions: int
    expand_ns: int
    expanded_ahead: int
    used_ahead: int
    fused_calls: int
    fused_ns: int
    blocked_calls: int
    blocked_ns: int
    captures: int
    replays: int
    copied_bytes: int
    scratch_bytes: int


class Served:
    """`model.tierd`: the model's side of its daemon. A context manager that closes it.

    attendant: of these leases; ends with the model. end: frees what the model was loaded through
    (the connection, a private daemon).
    """

    def __init__(
        self,
        leases: LayerLeases,
        attendant: Attendant,
        arithmetic: Arithmetic,
        sites: list[Site],
        copied_bytes: int,
        end: Callable[[], None],
        graphs: Graphs | None = None,
    ) -> None:
        self.leases = leases
        #: Passes that a GPU repeats by itself; None if the model was loaded without.
        self.graphs = graphs
        self._arithmetic = arithmetic
        self._sites = sites
        self._copied_bytes = copied_bytes
        # Not bound to self: also runs when the model is collected, and at exit.
        self._finalizer = weakref.finalize(
            self, _end, leases, graphs, attendant, fork.current(), end
        )

    def __repr__(self) -> str:
        where = f"{self.compute} on {self.device} by {self.kernels}, from {self.tier}"
        return f"<tierd: model {self.leases.opened.name!r}, {where}>"

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._arithmetic.device

    @property
    def tier(self) -> str:
        """What its layers are leased from: "dram" or "gpu:N"."""
        return self.leases.opened.connection.tier

    @property
    def compute(self) -> Compute:
        """How packed weights are multiplied."""
        return self._arithmetic.compute

    @property
    def kernels(self) -> str:
        """Which kernels multiply: "cpu", or on a GPU what TIERD_GPU_KERNELS says."""
        return self._arithmetic.kernels

    def statistics(self) -> ModelStatistics:
        """Totals since the model was loaded."""
        leasing, arithmetic = self.leases.counters(), self._arithmetic.counters()
        return ModelStatistics(
            entries=leasing.entries,
            leases=leasing.leases,
            ahead=leasing.ahead,
            kept=leasing.kept,
            stall_ns=leasing.stall_ns,
            expansions=arithmetic.expansions,
            expand_ns=arithmetic.expand_ns,
            expanded_ahead=arithmetic.expanded_ahead,
            used_ahead=arithmetic.used_ahead,
            fused_calls=arithmetic.fused_calls,
            fused_ns=arithmetic.fused_ns,
            blocked_calls=arithmetic.blocked_calls,
            blocked_ns=arithmetic.blocked_ns,
            captures=0 if self.graphs is None else self.graphs.captures,
            replays=0 if self.graphs is None else self.graphs.replays,
            copied_bytes=self._copied_bytes + sum(site.copied_bytes for site in self._sites),
            scratch_bytes=self._arithmetic.scratch_bytes,
        )

    def close(self) -> None:
        """Give back all leases and end the connection; a private daemon stops. Later forward passes
        raise ClientClosed. Again does nothing."""
        self._finalizer()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _end(
    leases: LayerLeases,
    graphs: Graphs | None,
    attendant: Attendant,
    life: fork.Life,
    end: Callable[[], None],
) -> None:
    def give_back() -> None:
        try:
            if graphs is not None:
                graphs.close()  # raises what it likes where the GPU is lost
        finally:
            try:
                leases.close()
            finally:
                end()

    if life is fork.current():  # a forked child owns none of this
        attendant.stop(give_back)


_WHERE = "its weights are in memory that tierd shares between processes"
_REFUSED = {
    "_apply": f"moving or converting (.to, .cuda, .half, .float, ...) is refused: {_WHERE}",
    "save_pretrained": f"save_pretrained is refused: {_WHERE}; use `tierctl unpack PACK OUT`",
    "push_to_hub": f"push_to_hub is refused: {_WHERE}; use `tierctl unpack PACK OUT`",
    "state_dict": f"state_dict is refused: {_WHERE}; use `tierctl unpack PACK OUT`",
    "load_state_dict": f"load_state_dict is refused: {_WHERE}; pack the other checkpoint",
    "resize_token_embeddings": f"resize_token_embeddings is refused: {_WHERE}",
    "__deepcopy__": f"copying is refused: {_WHERE}; load the model again, they are shared",
    "__reduce_ex__": f"pickling is refused: {_WHERE}; load the model in the other process",
}


class _ServedMethods:
    """Goes before a transformers class in the bases of a served model's class."""

    _tierd_device: torch.device

    @property
    def device(self) -> torch.device:
        """Where it computes. The inherited property would say "meta", its parameters' device."""
        return self._tierd_device

    def to(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(self, "_apply")

    cuda = half = float = to

    def get_compiled_call(self, compile_config: Any) -> Any:
        """What `generate` decodes with on a GPU, with a static cache: this model as it is, unless
        the user asked for torch.compile. The inherited method would choose that by itself."""
        if compile_config is None:
            return self.__call__  # type: ignore[operator]
        if isinstance(self, _GraphedMethods):
            raise UnsupportedOperation(
                f"{type(self).__name__}: compile_config is refused: the model was loaded with "
                "graphs=True, which captures its passes as they are"
            )
        return super().get_compiled_call(compile_config)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise UnsupportedOperation(f"{type(self).__name__}: training is refused: {_WHERE}")
        return super().train(mode)  # type: ignore[misc]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if requires_grad:
            raise UnsupportedOperation(f"{type(self).__name__}: gradients are refused: {_WHERE}")
        return super().requires_grad_(requires_grad)  # type: ignore[misc]


class _GraphedMethods(_ServedMethods):
    """The same for a model whose passes may be captured."""

    tierd: Served
    config: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, graphs = super().__call__, self.tierd.graphs  # type: ignore[misc]
        assert graphs is not None
        if args:
            names = inspect.signature(self.forward).parameters  # type: ignore[attr-defined]
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        return graphs.call(run, kwargs, str(self.config._attn_implementation))


def _refuse(model: Any, operation: str) -> NoReturn:
    raise UnsupportedOperation(f"{type(model).__name__}: {_REFUSED[operation]}")


def _refusing(operation: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse(self, operation)

    return refuse


_classes: dict[tuple[type, type], type] = {}


def _served_class(original: type, methods: type[_ServedMethods]) -> type:
    if (methods, original) in _classes:
        return _classes[methods, original]
    # Name and module stay: transformers finds per-class facts (losses, recordable outputs, task
    # mappings) by them, and the class behaves as the one that it names.
    members = {name: _refusing(name) for name in _REFUSED}
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    served = type(original.__name__, (methods, original), {**members, **names})
    return _classes.setdefault((methods, original), served)


def serve(model: Any, served: Served) -> None:
    """Make `model`, and every transformers model inside it, refuse what would move its weights."""
    from transformers import PreTrainedModel

    for module in list(model.modules()):
        if isinstance(module, PreTrainedModel):
            graphed = module is model and served.graphs is not None
            methods = _GraphedMethods if graphed else _ServedMethods
            module.__class__ = _served_class(type(module), methods)
            module._tierd_device = served.device
    model.tierd = served
