"""A compiled module of another source is refused before anything is asked of it."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from tierd_kernels import _cpu, _encode, native
from tierd_kernels.errors import KernelsError, OtherBuild

HEADER = Path(__file__).parents[2] / "kernels/cpu/interface.h"


def test_the_modules_that_are_installed_are_those_of_this_source() -> None:
    for module in (_cpu, _encode):
        native.check(module)
    assert f"kInterface = {native.INTERFACE};" in HEADER.read_text()


@pytest.mark.parametrize("found", [0, native.INTERFACE + 1])
def test_another_one_is_refused_with_both_numbers_and_what_to_do(found: int) -> None:
    other = ModuleType("tierd_kernels._cpu")
    other.__file__ = "/packages/_cpu.so"
    if found:
        other.INTERFACE = found  # type: ignore[attr-defined]
    text = (
        f"/packages/_cpu.so was built with interface {found}, this source of tierd_kernels has "
        f"interface {native.INTERFACE}: build it again"
    )
    with pytest.raises(OtherBuild, match=re.escape(text)) as refused:
        native.check(other)
    assert isinstance(refused.value, KernelsError)
    assert isinstance(refused.value, ImportError)
