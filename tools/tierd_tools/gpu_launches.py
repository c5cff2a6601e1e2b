"""Which kernels a call launches on a GPU, and what each of them takes of a multiprocessor.

What Triton launches says its name and handle to hooks; the driver says registers, shared memory and
how many of it fit one multiprocessor. For whoever reads a figure that is not what was hoped for.
"""

from __future__ import annotations

import ctypes
import json
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LIBRARY: Final = "libcuda.so.1"
WARPS: Final = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48}
"""A multiprocessor's, by compute capability (CUDA programming guide, technical specifications)."""
_LOCAL_BYTES, _REGISTERS = 3, 4  # CU_FUNC_ATTRIBUTE_*
_CLOCK_KILOHERTZ = 13  # CU_DEVICE_ATTRIBUTE_CLOCK_RATE


@dataclass(frozen=True, slots=True)
class Launched:
    """One kernel. shared_bytes, spilled_bytes: of a program, and of a thread. programs: that run on
    a multiprocessor at once."""

    name: str
    warps: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    programs: int

    def text(self, most_warps: int) -> str:
        spilled = f", {self.spilled_bytes} bytes of local memory" if self.spilled_bytes else ""
        return (
            f"{self.name}: {self.registers} registers, {self.shared_bytes >> 10} KiB shared"
            f"{spilled}, {self.programs} programs of {self.warps} warps on a multiprocessor "
            f"({self.programs * self.warps / most_warps:.0%} of its warps)"
        )


class Launches:
    """Watches from now on; kernels that Triton loaded before are not known.

    runtime: Triton's knobs, driver: libcuda; tests play both.
    """

    def __init__(self, runtime: Any = None, driver: Any = None) -> None:
        if runtime is None:
            from triton import knobs

            runtime = knobs.runtime
        self._runtime = runtime
        self._driver = ctypes.CDLL(LIBRARY) if driver is None else driver
        self._metadata: dict[int, dict[str, Any]] = {}
        self._names: dict[int, str] = {}
        runtime.kernel_load_end_hook.add(self._loaded)

    def close(self) -> None:
        self._runtime.kernel_load_end_hook.remove(self._loaded)

    def clock_hertz(self, number: int) -> float:
        """The highest clock of the multiprocessors of that GPU, as CUDA counts them."""
        found = ctypes.c_int()
        self._ask("cuDeviceGetAttribute", found, _CLOCK_KILOHERTZ, number)
        return found.value * 1e3

    def of(self, call: Callable[[], object]) -> list[Launched]:
        """The kernels that the call launches, each once."""
        with self._watching() as functions:
            call()
        return [self._described(function) for function in functions if function in self._metadata]

    @contextmanager
    def _watching(self) -> Iterator[list[int]]:
        functions: list[int] = []

        def entered(launch: Any) -> None:
            said = launch.get()
            if said["function"] not in functions:
                functions.append(said["function"])

        self._runtime.launch_enter_hook.add(entered)
        try:
            yield functions
        finally:
            self._runtime.launch_enter_hook.remove(entered)

    def _loaded(
        self, module: Any, function: int, name: str, files: dict[str, str], digest: str
    ) -> None:
        metadata = next(path for file, path in files.items() if file.endswith(".json"))
        self._metadata[function] = json.loads(Path(metadata).read_text())
        self._names[function] = name

    def _described(self, function: int) -> Launched:
        metadata = self._metadata[function]
        warps, shared = int(metadata["num_warps"]), int(metadata["shared"])
        programs = ctypes.c_int()
        self._ask(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            *(programs, ctypes.c_void_p(function), 32 * warps, ctypes.c_size_t(shared)),
        )
        return Launched(
            self._names[function],
            warps,
            self._attribute(_REGISTERS, function),
            shared,
            self._attribute(_LOCAL_BYTES, function),
            programs.value,
        )

    def _attribute(self, which: int, function: int) -> int:
        found = ctypes.c_int()
        self._ask("cuFuncGetAttribute", found, which, ctypes.c_void_p(function))
        return found.value

    def _ask(self, name: str, found: ctypes.c_int, *arguments: Any) -> None:
        code = getattr(self._driver, name)(ctypes.byref(found), *arguments)
        if code:
            raise RuntimeError(f"{name} failed with {code}")
