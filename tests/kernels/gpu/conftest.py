"""Where the Triton kernels run: under the interpreter on the CPU, compiled on a GPU, or compiled
for one and their PTX executed here (`ptx/`).

The same tests for all. A process has one of them: Triton decides when it is imported.
TIERD_KERNELS_DEVICE=cuda (`make gpu-acceptance` sets it) takes the GPU, and the tests of this
folder that use `device` are then marked `gpu`; TIERD_KERNELS_DEVICE=sm_80, sm_90 or
sm_100 (`make ptx`) compiles for such a processor, which need not be there.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE: Final = Path(__file__).parent
DEVICE: Final = os.environ.get("TIERD_KERNELS_DEVICE", "")
ON_GPU: Final = DEVICE == "cuda"
INTERPRETED: Final = not DEVICE
if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"  # tests/conftest.py said so before anybody asked


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not ON_GPU:
        return
    for item in items:
        if item.path.is_relative_to(HERE) and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Of the arrays that a test gives to the kernels."""
    if ON_GPU and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(scope="session")
def host(device: torch.device) -> torch.device:
    """As `device`, for tests that watch the host's memory around the arrays: not on a GPU."""
    if not INTERPRETED:
        pytest.skip("watches the host's memory: with the interpreter only")
    return device


@pytest.fixture(scope="session", autouse=True)
def interpreter_does_nothing_twice() -> None:
    """Nearly half of its time: it computes integers again for an overflow that it looks for in
    debug alone, and prepares the language again whenever a kernel calls a function.
    """
    if INTERPRETED:
        from triton.runtime import interpreter

        builder = interpreter.interpreter_builder
        builder.options = replace(builder.options, sanitize_overflow=False)
        called = set()
        call = interpreter.InterpretedFunction.__call__

        def call_again(function: Any, *arguments: Any, **named: Any) -> Any:
            if function in called:
                return function.rewrite()(*arguments, **named)
            called.add(function)
            return call(function, *arguments, **named)

        interpreter.InterpretedFunction.__call__ = call_again


@pytest.fixture(scope="session", autouse=True)
def processor_that_is_not_here() -> Iterator[None]:
    """Where TIERD_KERNELS_DEVICE names one, each launch is compiled for it and its PTX executed."""
    if not DEVICE.startswith("sm_"):
        yield
        return
    from tests.kernels.gpu.ptx.triton_launch import launches_on

    with launches_on(int(DEVICE.removeprefix("sm_"))):
        yield
