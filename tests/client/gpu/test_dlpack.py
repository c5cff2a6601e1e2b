from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref

import numpy as np
import torch

from tierd_client.gpu import dlpack
from tierd_client.gpu.dlpack import DLManagedTensor, bytes_at, make_capsule

CPU = torch.device("cpu")


class Owner:
    """Memory that somebody else owns."""

    def __init__(self, nbytes: int) -> None:
        self.array = np.arange(nbytes, dtype=np.uint8)

    @property
    def address(self) -> int:
        return self.array.ctypes.data


def test_a_tensor_shows_the_memory_itself() -> None:
    owner = Owner(64)
    tensor = bytes_at(owner.address + 8, 16, CPU, owner)
    assert tensor.data_ptr() == owner.address + 8
    assert tensor.dtype == torch.uint8
    assert tensor.tolist() == list(range(8, 24))
    owner.array[8] = 99
    assert tensor[0] == 99


def test_its_owner_lives_as_long_as_anything_that_shares_the_storage() -> None:
    owner = Owner(64)
    gone = weakref.ref(owner)
    tensor = bytes_at(owner.address, 64, CPU, owner)
    row = tensor.view(torch.bfloat16).view(4, 8)[2]
    del owner, tensor
    gc.collect()
    assert gone() is not None
    del row
    assert gone() is None


def test_nothing_is_remembered_of_tensors_that_are_gone() -> None:
    owner = Owner(64)
    before = len(dlpack._managed)
    tensors = [bytes_at(owner.address, 64, CPU, owner) for _ in range(10)]
    assert len(dlpack._managed) == before + 10
    del tensors
    assert len(dlpack._managed) == before


def test_an_empty_range_is_an_empty_tensor() -> None:
    owner = Owner(1)
    assert bytes_at(owner.address, 0, CPU, owner).shape == (0,)


def test_a_capsule_for_cuda_says_which_gpu_and_where() -> None:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    number, capsule = make_capsule(0x7000000, 4096, dlpack.CUDA, 3, "owner")
    managed = DLManagedTensor.from_address(pointer(capsule, b"dltensor"))
    tensor = managed.dl_tensor
    assert (tensor.data, tensor.ndim, tensor.shape[0]) == (0x7000000, 1, 4096)
    assert (tensor.device.device_type, tensor.device.device_id) == (2, 3)
    assert (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) == (1, 8, 1)
    assert not tensor.strides
    assert tensor.byte_offset == 0
    assert dlpack._managed[number][2] == "owner"
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(managed.deleter)(ctypes.addressof(managed))
    assert number not in dlpack._managed


def test_a_tensor_may_outlive_the_interpreters_modules() -> None:
    program = """
import sys, numpy, torch
from tierd_client.gpu.dlpack import bytes_at
array = numpy.zeros(64, numpy.uint8)
sys.kept = bytes_at(array.ctypes.data, 64, torch.device("cpu"), array)
torch.kept = sys.kept[3:]
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
