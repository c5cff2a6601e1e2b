"""Where the Triton kernels run: under the interpreter on the CPU, or compiled on a GPU.

The same tests for both. A process has one or the other: Triton decides when it is imported.
TIERD_KERNELS_DEVICE=cuda (`make gpu-acceptance` sets it) takes the GPU, and the tests of this
folder that use `device` are then marked `gpu`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import torch

HERE: Final = Path(__file__).parent
ON_GPU: Final = os.environ.get("TIERD_KERNELS_DEVICE") == "cuda"
if not ON_GPU:
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
    if device.type != "cpu":
        pytest.skip("watches the host's memory: with the interpreter only")
    return device


@pytest.fixture(scope="session", autouse=True)
def interpreter_checks_no_overflow() -> None:
    """It computes integers a second time for them, and looks only where it debugs."""
    if not ON_GPU:
        from triton.runtime.interpreter import interpreter_builder

        options = replace(interpreter_builder.options, sanitize_overflow=False)
        interpreter_builder.options = options
