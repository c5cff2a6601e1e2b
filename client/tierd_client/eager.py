"""What `torch.compile` leaves as it is: it compiles the model around this code.

Leases come and go with each pass, and a product reads memory and runs kernels that torch does not
know: a graph that had them inside would read other layers' bytes at its next run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

P = ParamSpec("P")
R = TypeVar("R")

REASON = "tierd leases the layer for this pass only, and multiplies it where it lies"


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """The function, at which a graph of `torch.compile` breaks; `fullgraph=True` names REASON.

    An ordinary call takes a microsecond longer.
    """
    disable: Any = torch.compiler.disable
    found: Callable[P, R] = disable(function, reason=REASON)
    return found
