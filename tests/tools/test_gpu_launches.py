"""Which kernels a call launches, and what they take: over a Triton and a driver that are played."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tierd_tools.gpu_launches import Launched, Launches

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable
    from pathlib import Path


class Hooks(list["Callable[..., None]"]):
    def add(self, hook: Callable[..., None]) -> None:
        self.append(hook)

    def __call__(self, *arguments: Any) -> None:
        for hook in list(self):
            hook(*arguments)


class Runtime:
    """Triton's knobs, and how it would call them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kernel_load_end_hook = Hooks()
        self.launch_enter_hook = Hooks()

    def load(self, function: int, name: str, warps: int) -> None:
        path = self.folder / f"{name}.json"
        path.write_text(json.dumps({"num_warps": warps, "shared": 4096}))
        self.kernel_load_end_hook(None, function, name, {f"{name}.json": str(path)}, "digest")

    def launch(self, function: int, name: str) -> None:
        class Lazy:
            def get(self) -> dict[str, Any]:
                return {"name": name, "function": function, "stream": 0}

        self.launch_enter_hook(Lazy())


class Driver:
    """libcuda: 96 registers, 8 bytes of local memory, 5 programs."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.asked: list[tuple[int, int]] = []

    def cuFuncGetAttribute(self, found: Any, which: int, function: ctypes.c_void_p) -> int:
        found._obj.value = {4: 96, 3: 8}[which]
        return self.code

    def cuDeviceGetAttribute(self, found: Any, which: int, number: int) -> int:
        found._obj.value = {(13, 0): 1_980_000}[which, number]
        return self.code

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(
        self, found: Any, function: ctypes.c_void_p, threads: int, shared: ctypes.c_size_t
    ) -> int:
        found._obj.value = 5
        self.asked.append((threads, shared.value))
        return self.code


def test_kernels_of_a_call_are_named_once_with_what_they_take(tmp_path: Path) -> None:
    runtime, driver = Runtime(tmp_path), Driver()
    launches = Launches(runtime, driver)
    runtime.load(11, "multiply", 4)
    runtime.load(12, "add", 8)
    runtime.launch(12, "add")  # before the call

    def call() -> None:
        runtime.launch(11, "multiply")
        runtime.launch(11, "multiply")
        runtime.launch(99, "of somebody who loaded it before")

    found = launches.of(call)
    assert found == [Launched("multiply", 4, 96, 4096, 8, 5)]
    assert driver.asked == [(128, 4096)]
    assert found[0].text(64) == (
        "multiply: 96 registers, 4 KiB shared, 8 bytes of local memory, "
        "5 programs of 4 warps on a multiprocessor (31% of its warps)"
    )
    assert not runtime.launch_enter_hook
    launches.close()


def test_a_driver_that_refuses_is_an_error(tmp_path: Path) -> None:
    runtime = Runtime(tmp_path)
    launches = Launches(runtime, Driver(code=400))
    runtime.load(11, "multiply", 4)
    with pytest.raises(RuntimeError, match="failed with 400"):
        launches.of(lambda: runtime.launch(11, "multiply"))


def test_the_clock_is_the_drivers(tmp_path: Path) -> None:
    assert Launches(Runtime(tmp_path), Driver()).clock_hertz(0) == 1.98e9
