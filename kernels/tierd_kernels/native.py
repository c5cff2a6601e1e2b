"""Whether the compiled modules are those of this source.

An installation from a checkout keeps modules that were built before the source changed.
"""

from types import ModuleType
from typing import Final

from tierd_kernels.errors import OtherBuild

INTERFACE: Final = 1
"""kernels/cpu/interface.h has the same number."""


def check(module: ModuleType) -> None:
    """Raise OtherBuild for a module that was built from other bindings."""
    found = getattr(module, "INTERFACE", 0)  # the first ones had no number
    if found != INTERFACE:
        raise OtherBuild(
            f"{module.__file__} was built with interface {found}, this source of tierd_kernels has "
            f"interface {INTERFACE}: build it again (make venv, or pip install tierd)"
        )
