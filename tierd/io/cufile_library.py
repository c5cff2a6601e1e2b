"""libcufile.so.0 through ctypes: the few calls that a reader needs, with its codes as exceptions.

Nothing is loaded before `open`. Compatibility mode (cuFile reads through DRAM and says nothing) is
switched off before the driver is opened, so that a machine without GPUDirect Storage refuses here.
Source: cufile.h of nvidia-cufile 1.15.1.6 and 1.19.1.55.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tierd.errors import TierdError

LIBRARY: Final = "libcufile.so.0"

_OPAQUE_FD = 1  # CU_FILE_HANDLE_TYPE_OPAQUE_FD
_ALLOW_COMPAT_MODE = 1  # CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE
_FORCE_COMPAT_MODE = 2
_STATISTICS_PER_GPU = 3  # the level at which reads are counted by the way that they took
_CODE_BASE = 5000
_CODES: Final = {
    5001: "the nvidia-fs driver is not loaded, and there is no PCI P2PDMA",
    5007: "GPUDirect Storage is not supported on this platform",
    5008: "GPUDirect Storage is not supported on this file",
    5009: "GPUDirect Storage is not supported on this GPU",
    5011: "a call of the CUDA driver failed",
    5020: "the file was opened without O_DIRECT",
    5025: "permission denied",
    5033: "the nvidia-fs driver cannot be set up",
    5034: "GPUDirect Storage is disabled for this file",
    5036: "GPU memory cannot be pinned",
}

#: Where the number of GPUs stands in the third level of statistics, by version of the library: the
#: levels before it grew. An array of `_Gpu` follows, 8 bytes later.
_COUNT_AT: Final = {1150: 1024, 1190: 1136}
_MOST_GPUS = 16
_STATISTICS_BYTES = 1 << 16  # far more than any version fills


class CuFileError(TierdError, OSError):
    """cuFile refused a call. Names the call and the code."""


class GpuDirectUnavailable(CuFileError):
    """SSD to GPU without DRAM does not work here. `advice`: what to do about it."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}: {advice}")
        self.reason = reason
        self.advice = advice


@dataclass(frozen=True, slots=True)
class Reads:
    """What cuFile counted since the driver was opened, over all GPUs."""

    nbytes: int = 0
    p2p: int = 0  #: from the SSD to the GPU, by PCI P2PDMA
    nvfs: int = 0  #: from the SSD to the GPU, by nvidia-fs
    posix: int = 0  #: through DRAM

    @property
    def direct(self) -> int:
        return self.p2p + self.nvfs

    def since(self, before: Reads) -> Reads:
        return Reads(
            self.nbytes - before.nbytes, self.p2p - before.p2p,
            self.nvfs - before.nvfs, self.posix - before.posix,
        )  # fmt: skip


class _Error(ctypes.Structure):
    _fields_ = (("code", ctypes.c_int), ("cuda", ctypes.c_int))


class _Handle(ctypes.Union):
    _fields_ = (("fd", ctypes.c_int), ("handle", ctypes.c_void_p))


class _Description(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("handle", _Handle),
        ("operations", ctypes.c_void_p),
    )


class _Gpu(ctypes.Structure):
    """CUfilePerGpuStats; the names are ours."""

    _fields_ = (
        ("uuid", ctypes.c_char * 16),
        ("read_bytes", ctypes.c_uint64),
        ("rates", ctypes.c_uint64 * 3),
        ("reads", ctypes.c_uint64),
        ("p2p", ctypes.c_uint64),
        ("nvfs", ctypes.c_uint64),
        ("posix", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 21),
    )


_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cuFileGetVersion": (ctypes.POINTER(ctypes.c_int),),
    "cuFileSetParameterBool": (ctypes.c_int, ctypes.c_bool),
    "cuFileSetStatsLevel": (ctypes.c_int,),
    "cuFileDriverOpen": (),
    "cuFileDriverClose_v2": (),
    "cuFileStatsStart": (),
    "cuFileGetStatsL3": (ctypes.c_void_p,),
    "cuFileHandleRegister": (ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(_Description)),
    "cuFileBufRegister": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    "cuFileBufDeregister": (ctypes.c_void_p,),
}


class CuFileLibrary:
    """One open cuFile driver. Calls may be made in any thread that has the GPU's context."""

    def __init__(self, library: str | None = None) -> None:
        """library: its path (tests: a fake); None: where the system or pip has it."""
        self._path = library or _find()
        self._calls: Any = None
        self._count_at = 0

    def open(self) -> None:
        """Raises GpuDirectUnavailable: then nothing stays open."""
        # cuFile writes a log into the working directory unless it is told where to.
        os.environ.setdefault("CUFILE_LOGFILE_PATH", os.devnull)
        try:
            self._calls = ctypes.CDLL(self._path, use_errno=True)
        except OSError as error:
            raise GpuDirectUnavailable(
                f"cuFile cannot be loaded ({error})",
                "install it (pip install nvidia-cufile, or CUDA's libcufile)",
            ) from error
        self._declare()
        version = ctypes.c_int()
        try:
            self._call("cuFileGetVersion", ctypes.byref(version))
            self._count_at = self._layout(version.value)
            self._call("cuFileSetParameterBool", _FORCE_COMPAT_MODE, False)
            self._call("cuFileSetParameterBool", _ALLOW_COMPAT_MODE, False)
            self._call("cuFileSetStatsLevel", _STATISTICS_PER_GPU)
            self._call("cuFileDriverOpen")
        except GpuDirectUnavailable:
            raise
        except CuFileError as error:
            raise GpuDirectUnavailable(
                str(error),
                "see `gdscheck -p`: nvidia-fs loaded, or Linux 6.2 with PCI P2PDMA and an NVMe SSD",
            ) from error
        try:
            self._call("cuFileStatsStart")
            self.reads()
        except CuFileError as error:
            self.close()
            raise GpuDirectUnavailable(
                f"cuFile does not count its reads ({error}), so nothing proves that they are "
                f"direct", "leave gpu_direct off",
            ) from error  # fmt: skip

    def _declare(self) -> None:
        try:
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._calls, name)
                function.argtypes, function.restype = arguments, _Error
            self._calls.cuFileHandleDeregister.argtypes = (ctypes.c_void_p,)
            self._calls.cuFileHandleDeregister.restype = None
            self._calls.cuFileRead.argtypes = (
                ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64, ctypes.c_int64,
            )  # fmt: skip
            self._calls.cuFileRead.restype = ctypes.c_ssize_t
        except AttributeError as error:
            raise GpuDirectUnavailable(
                f"{self._path} is too old ({error}): cuFile counts reads by their way since 1.15",
                "install nvidia-cufile 1.15 or later",
            ) from error

    def _layout(self, version: int) -> int:
        if version not in _COUNT_AT:
            known = ", ".join(f"{number // 1000}.{number % 1000 // 10}" for number in _COUNT_AT)
            raise GpuDirectUnavailable(
                f"cuFile {version // 1000}.{version % 1000 // 10} lays its counters out in a way "
                f"that is not known here (known: {known}), so nothing proves that reads are direct",
                "install one of these versions",
            )
        return _COUNT_AT[version]

    def close(self) -> None:
        """What cannot be closed is left to the end of the process."""
        self._calls.cuFileDriverClose_v2()

    def reads(self) -> Reads:
        """Raises CuFileError."""
        memory = (ctypes.c_uint8 * _STATISTICS_BYTES)()
        self._call("cuFileGetStatsL3", memory)
        count = ctypes.c_uint32.from_buffer(memory, self._count_at).value
        if count > _MOST_GPUS:
            raise CuFileError(f"cuFileGetStatsL3: {count} GPUs, more than its {_MOST_GPUS}")
        gpus = (_Gpu * count).from_buffer(memory, self._count_at + 8)
        return Reads(
            nbytes=sum(gpu.read_bytes for gpu in gpus),
            p2p=sum(gpu.p2p for gpu in gpus),
            nvfs=sum(gpu.nvfs for gpu in gpus),
            posix=sum(gpu.posix for gpu in gpus),
        )

    def add_file(self, fd: int) -> int:
        """A handle of a file that was opened with O_DIRECT. Undone by `drop_file`."""
        handle = ctypes.c_void_p()
        description = _Description(_OPAQUE_FD, _Handle(fd=fd), None)
        self._call("cuFileHandleRegister", ctypes.byref(handle), ctypes.byref(description))
        return int(handle.value or 0)

    def drop_file(self, handle: int) -> None:
        self._calls.cuFileHandleDeregister(handle)

    def add_memory(self, address: int, nbytes: int) -> None:
        """Pin GPU memory. Undone by `drop_memory`."""
        self._call("cuFileBufRegister", address, nbytes, 0)

    def drop_memory(self, address: int) -> None:
        self._call("cuFileBufDeregister", address)

    def read(self, handle: int, address: int, nbytes: int, offset: int, at: int) -> int:
        """[offset, offset + nbytes) of the file to `address` + `at`, where `address` is the start
        of pinned memory. Returns the bytes that came. Without the GIL."""
        got = int(self._calls.cuFileRead(handle, address, nbytes, offset, at))
        if got >= 0:
            return got
        number = ctypes.get_errno()
        said = os.strerror(number) if got == -1 else _text(-got)
        raise CuFileError(f"cuFileRead of {nbytes} bytes at offset {offset}: {said}")

    def _call(self, name: str, *arguments: Any) -> None:
        result = getattr(self._calls, name)(*arguments)
        if result.code:
            cuda = f", CUDA says {result.cuda}" if result.cuda else ""
            raise CuFileError(f"{name}: {_text(result.code)}{cuda}")


def _find() -> str:
    """The name, for the system to look up; or the path where a wheel of NVIDIA has put it."""
    for folder in filter(None, sys.path):
        for package in ("nvidia/cu13", "nvidia/cufile"):
            path = Path(folder, package, "lib", LIBRARY)
            if path.is_file():
                return str(path)
    return LIBRARY


def _text(code: int) -> str:
    return f"{_CODES.get(abs(code), 'see CUfileOpError in cufile.h')} ({abs(code)})"
