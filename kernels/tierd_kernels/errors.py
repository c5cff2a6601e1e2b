"""Errors of the kernels.

KernelsError
├── KernelError        (ValueError)    arrays that do not fit each other, or whose contents lie
├── WrongKernel        (RuntimeError)  what was compiled here computes something else
├── OtherBuild         (ImportError)   a compiled module is not of this source
└── UnsupportedKernel  (RuntimeError)  TIERD_KERNELS names a kernel that is not here
"""


class KernelsError(Exception):
    """Base of everything that this package raises on purpose."""


class KernelError(KernelsError, ValueError):
    """An array has the wrong type, shape or contents. The output's contents are then undefined."""


class WrongKernel(KernelsError, RuntimeError):
    """A kernel that was compiled on this machine does not compute what the specification says."""


class OtherBuild(KernelsError, ImportError):
    """A compiled module was built from other bindings than the Python that imports it expects."""


class UnsupportedKernel(KernelsError, RuntimeError):
    """The kernel asked for by name is unknown, or this processor cannot run it."""
