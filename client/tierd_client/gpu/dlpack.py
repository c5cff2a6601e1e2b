"""Tensors over memory that torch did not allocate, by DLPack: on the host and on CUDA.

A capsule holds a `DLManagedTensor`, which torch takes over; its deleter is called when the storage
of all that was made from it is gone. Source: dlpack.h of github.com/dmlc/dlpack, version 0.8.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

CPU, CUDA = 1, 2  # kDLCPU, kDLCUDA
UNSIGNED = 1  # kDLUInt
_NAME = b"dltensor"  # the capsule keeps this pointer, so it must live on


class DLDevice(ctypes.Structure):
    _fields_ = (("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


class DLDataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", DLDevice),
        ("ndim", ctypes.c_int32),
        ("dtype", DLDataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # NULL: compact, rows first
        ("byte_offset", ctypes.c_uint64),
    )


class DLManagedTensor(ctypes.Structure):
    _fields_ = (
        ("dl_tensor", DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


#: What each capsule needs until its deleter runs, by the number in `manager_ctx`: the structure,
#: its shape, and who owns the memory.
_managed: dict[int, tuple[DLManagedTensor, Any, Any]] = {}
_numbers = itertools.count(1)


def _make_deleter(managed: dict[int, Any]) -> Any:
    prototype = ctypes.CFUNCTYPE(None, ctypes.POINTER(DLManagedTensor))

    # Its names are its own: a tensor may go when this module's are gone already.
    def delete(
        pointer: Any, forget: Callable[..., Any] = managed.pop, nothing: object = None
    ) -> None:
        forget(pointer.contents.manager_ctx, nothing)

    deleter = prototype(delete)
    # Never freed, for the same reason.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(deleter))
    return deleter


_deleter = _make_deleter(_managed)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def bytes_at(address: int, nbytes: int, device: torch.device, owner: Any) -> torch.Tensor:
    """A uint8 tensor over [address, address + nbytes), whose storage holds `owner` until it is
    gone. device: a CPU or CUDA device with its index. Nothing is read, nothing is synchronised."""
    from torch.utils.dlpack import from_dlpack

    kind = CUDA if device.type == "cuda" else CPU
    number, capsule = make_capsule(address, nbytes, kind, device.index or 0, owner)
    try:
        tensor: torch.Tensor = from_dlpack(capsule)
        return tensor
    except BaseException:
        _managed.pop(number, None)  # nobody took it over
        raise


def make_capsule(
    address: int, nbytes: int, device_type: int, device_id: int, owner: Any
) -> tuple[int, Any]:
    """The number under which it is remembered, and the capsule, which must be taken over."""
    number = next(_numbers)
    shape = (ctypes.c_int64 * 1)(nbytes)
    managed = DLManagedTensor()
    managed.dl_tensor.data = address
    managed.dl_tensor.device = DLDevice(device_type, device_id)
    managed.dl_tensor.ndim = 1
    managed.dl_tensor.dtype = DLDataType(UNSIGNED, 8, 1)
    managed.dl_tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
    managed.manager_ctx = number
    managed.deleter = ctypes.cast(_deleter, ctypes.c_void_p).value
    _managed[number] = managed, shape, owner
    return number, _new_capsule(ctypes.addressof(managed), _NAME, None)
