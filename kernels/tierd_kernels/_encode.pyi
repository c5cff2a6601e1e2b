"""The native encoder; tierd_kernels.encode is the interface."""

from typing import Annotated, overload

import numpy
from numpy.typing import NDArray


INTERFACE: int = 1

def encoder_names() -> tuple[tuple[str, bool], ...]:
    """
    (name, whether this processor can run it) of every encoder built, slowest first.
    """

@overload
def measure(bits: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), device='cpu', writable=False)], encoder: str) -> tuple[int, int, int]: ...

@overload
def measure(bits: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), device='cpu', writable=False)], encoder: str) -> tuple[int, int, int]:
    """
    Units of values: raw, exponent-packed with a bitmap, and in the dense form.
    """

@overload
def raw_structure(bits: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), device='cpu', writable=False)], bitmap: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu')], offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> int: ...

@overload
def raw_structure(bits: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), device='cpu', writable=False)], bitmap: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu')], offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> int:
    """Fill bitmap and offsets. Returns the units of values."""

@overload
def raw_values(bits: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), device='cpu', writable=False)], bitmap: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], values: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> None: ...

@overload
def raw_values(bits: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), device='cpu', writable=False)], bitmap: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], values: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> None:
    """Fill values."""

@overload
def exponent_structure(bits: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), device='cpu', writable=False)], bitmap: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu')] | None, offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu')], heads: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> int: ...

@overload
def exponent_structure(bits: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), device='cpu', writable=False)], bitmap: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu')] | None, offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu')], heads: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> int:
    """Fill bitmap, offsets and heads. Returns the units of values."""

@overload
def exponent_values(bits: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), device='cpu', writable=False)], bitmap: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], heads: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], values: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> None: ...

@overload
def exponent_values(bits: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), device='cpu', writable=False)], bitmap: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], heads: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], values: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> None:
    """Fill values."""

@overload
def choose_scales(bits: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), device='cpu', writable=False)], dtype: str, int4: bool, group: int, scales: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> bool: ...

@overload
def choose_scales(bits: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), device='cpu', writable=False)], dtype: str, int4: bool, group: int, scales: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> bool:
    """Fill scales. Returns whether all weights are finite."""

@overload
def level_structure(bits: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), device='cpu', writable=False)], dtype: str, int4: bool, group: int, scales: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order='C', device='cpu', writable=False)], bitmap: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu')] | None, offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> int: ...

@overload
def level_structure(bits: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), device='cpu', writable=False)], dtype: str, int4: bool, group: int, scales: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order='C', device='cpu', writable=False)], bitmap: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu')] | None, offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> int:
    """Fill bitmap and offsets. Returns the units of values."""

@overload
def level_values(bits: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), device='cpu', writable=False)], dtype: str, int4: bool, group: int, scales: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order='C', device='cpu', writable=False)], bitmap: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], values: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> None: ...

@overload
def level_values(bits: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), device='cpu', writable=False)], dtype: str, int4: bool, group: int, scales: Annotated[NDArray[numpy.uint16], dict(shape=(None,), order='C', device='cpu', writable=False)], bitmap: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, offsets: Annotated[NDArray[numpy.uint32], dict(shape=(None,), order='C', device='cpu', writable=False)], values: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu')], encoder: str) -> None:
    """Fill values."""

@overload
def prune(bits: Annotated[NDArray[numpy.uint16], dict(shape=(None, None), device='cpu')], infinity: int, wanted: int) -> None: ...

@overload
def prune(bits: Annotated[NDArray[numpy.uint32], dict(shape=(None, None), device='cpu')], infinity: int, wanted: int) -> None:
    """Set the `wanted` elements of smallest magnitude to +0.0."""
