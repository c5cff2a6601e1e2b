"""A CUDA graph that the host plays: operations of torch with the addresses that they were given.

Capturing does nothing, as on a GPU: what was written to is put back. A replay does the operations
again on the same memory, and so reads what is there then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable


#: A value that the host looks at, or brings.
_FORBIDDEN = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.lift_fresh.default)


class FakeGraph:
    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def capture(self, run: Callable[[], Any]) -> Any:
        recorder = _Recorder(self.operations)
        try:
            with recorder:
                return run()
        finally:
            recorder.put_back()

    def replay(self) -> None:
        self.replays += 1
        with torch.no_grad():
            for function, arguments, options, result in self.operations:
                again = function(*arguments, **options)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    # What is no new memory was written in place, or is a view of what was.
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, operations: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations = operations
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        options = options or {}
        if function in _FORBIDDEN:
            raise RuntimeError("operation not permitted when stream is capturing")
        named = dict(zip((a.name for a in function._schema.arguments), arguments, strict=False))
        for argument in function._schema.arguments:
            written = argument.alias_info is not None and argument.alias_info.is_write
            tensor = {**named, **options}.get(argument.name)
            if written and isinstance(tensor, torch.Tensor):
                self._keep(tensor)
        result = function(*arguments, **options)
        self._operations.append((function, arguments, options, result))
        return result

    def _keep(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._before:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._before[storage.data_ptr()] = whole, whole.clone()

    def put_back(self) -> None:
        for whole, content in self._before.values():
            whole.copy_(content)
