"""The kernels compiled without a GPU, and what they need of one: registers, memory, instructions.

    python -m tierd_kernels.gpu.compiled                     every kernel, to stdout as JSON
    python -m tierd_kernels.gpu.compiled NAME...             some of them

In a process of its own: where TRITON_INTERPRET is set, Triton has nothing to compile. The launches
are those of `expand` and `linear`, with a driver that knows a processor and has none; so what is
compiled is what a launch on that processor would compile.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from tierd_kernels.errors import KernelError
from tierd_kernels.faults import new_faults
from tierd_kernels.gpu import cuda_product, expand, linear, nvcc, plans
from tierd_kernels.gpu.instructions import count, fewest, fewest_of_loop
from tierd_kernels.gpu.numbers import INTERPRETED
from tierd_kernels.torch_matrix import DTYPES, TorchMatrix
from tierd_layouts.codecs import fixed_bytes
from tierd_layouts.tile_grid import TileGrid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ARCHITECTURES: Final = (80, 90, 100)
MEASURED: Final = 90
"""Of the cards that the kernels are meant for: on this one every variant is recorded, on the others
those that are taken by default."""
FORMS: Final = (
    ("raw", True),
    *((codec, masked) for codec in ("exponent-packed", "int8", "int4") for masked in (True, False)),
)
PLANES: Final = 3
"""Of the exponent-packed matrices: unpruned weights have 3, pruned ones fewer."""
COUNTED_BLOCKS: Final = 4
"""Half of a tile: what is kept at 50 %."""
_WARP_LANES: Final = 32


@dataclass(frozen=True, slots=True)
class Kernel:
    """One thing to compile: `Way` of the expansion, or `Plan` of the product."""

    codec: str
    masked: bool
    dtype: str
    how: expand.Way | plans.Plan
    architecture: int

    @property
    def of_cuda(self) -> bool:
        """Whether nvcc compiles it, not Triton."""
        return isinstance(self.how, plans.Plan) and self.how.cuda

    @property
    def name(self) -> str:
        form = f"{self.codec}-{'masked' if self.masked else 'dense'}"
        if isinstance(self.how, expand.Way):
            how = f"expand/{form}/{self.dtype}/{self.how.variant}-{self.how.warps}warps"
        else:
            how = (
                f"linear/{form}/{self.dtype}/{self.how.variant}-{self.how.warps}warps"
                f"-{self.how.stages}stages-{self.how.tokens}tokens"
            )
        return f"{how}/sm_{self.architecture}"


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel takes.

    registers, spilled_bytes: of a thread; the latter are registers that are kept in memory.
    shared_bytes: of a program.   instructions: of the code, each of them counted once.
    issue_slots: of the warps of a program for a tile in which nothing is wrong and that has no
    escapes; in a product those of its loop. In CUDA's, a tile of exponent-packed keeps
    COUNTED_BLOCKS times 512 elements, one of int8 none (8 slots more for 512). A multiprocessor
    has 4 of them in a cycle.
    integer_slots: those of them that the integer pipe takes; it has 2 in a cycle.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: int
    issue_slots: int
    integer_slots: int


def kernels() -> Iterator[Kernel]:
    """Everything that is recorded."""
    for codec, masked in FORMS:
        for architecture in ARCHITECTURES:
            for tokens in plans.TOKEN_BLOCKS:
                if masked and tokens <= plans.CUDA_TOKENS.get(codec, 0):
                    plan = plans.Plan(tokens, 1, *plans.CUDA)
                    yield Kernel(codec, masked, "BF16", plan, architecture)
            for way in expand.ways(codec):
                if architecture == MEASURED or way == expand.DEFAULT_WAY:
                    yield Kernel(codec, masked, "BF16", way, architecture)
            if architecture == MEASURED:
                for dtype in ("F16", "F32"):
                    yield Kernel(codec, masked, dtype, expand.DEFAULT_WAY, architecture)
                usual = plans.Plan(plans.TOKEN_BLOCKS[0], 1, *plans.VARIANTS[0])
                yield Kernel(codec, masked, "F16", usual, architecture)
            for tokens in plans.TOKEN_BLOCKS:
                for warps, stages, variant in plans.VARIANTS:
                    if not plans.worth(codec, warps, stages, variant):
                        continue
                    default = (warps, stages, variant) == plans.VARIANTS[0]
                    if default or (architecture == MEASURED and tokens == plans.TOKEN_BLOCKS[0]):
                        plan = plans.Plan(tokens, 1, warps, stages, variant)
                        yield Kernel(codec, masked, "BF16", plan, architecture)


def resources(kernel: Kernel) -> Resources:
    """Compile a kernel and look at its code. Raises KernelError where the interpreter is on,
    or where there is no nvcc for a kernel in CUDA C++.
    """
    if INTERPRETED.value:
        raise KernelError("TRITON_INTERPRET is set: nothing is compiled in this process")
    cubin, dynamic_bytes = (_by_nvcc if kernel.of_cuda else _by_triton)(kernel)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("-res-usage", file.name)
        code = _tool("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise KernelError(f"{kernel.name}: cuobjdump says no resources: {usage[:200]!r}")
    warps = kernel.how.warps
    if kernel.of_cuda:
        blocks = COUNTED_BLOCKS if kernel.codec == "exponent-packed" else 0
        way, warps = fewest_of_loop(code, cuda_product.BLOCK_OPERAND, blocks), 1
    else:
        way = (fewest if isinstance(kernel.how, expand.Way) else fewest_of_loop)(code)
    registers, stack, shared, local = map(int, found.groups())
    return Resources(
        registers,
        stack + local,
        shared + dynamic_bytes,
        count(code),
        warps * len(way),
        warps * sum(each.of_integer_pipe for each in way),
    )


def _by_triton(kernel: Kernel) -> tuple[bytes, int]:
    """The binary, and the shared memory that a launch adds to what it says."""
    compiled = _compiled(kernel)
    return compiled.asm["cubin"], compiled.metadata.shared


def _by_nvcc(kernel: Kernel) -> tuple[bytes, int]:
    """As `_by_triton`. Raises KernelError where there is no nvcc."""
    assert isinstance(kernel.how, plans.Plan)
    options = cuda_product.options(_matrix(kernel), kernel.how.tokens)
    return nvcc.compiled(options, kernel.architecture, "cubin"), 0


class _NoGpu:
    """A driver that can say for which processor to compile, and no more.

    Triton keeps what it compiled by device: each processor is one.
    """

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._architecture, _WARP_LANES)

    def get_current_device(self) -> int:
        return self._architecture

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(
    architecture: int, then: Callable[[Any, Any, Any, tuple[Any, ...], bool], None]
) -> Iterator[None]:
    """Within, what is launched is compiled for this processor and not run.

    then: called with the function, what Triton made of it, the grid, the arguments, and whether the
    launch was a warmup, which runs nothing anyway.
    """
    run, before = JITFunction.run, driver._active

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = run(self, *arguments, grid=grid, warmup=True, **options)
        then(self, made, grid, arguments, warmup)
        return made

    driver.set_active(_NoGpu(architecture))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run
        driver._active = before


def _compiled(kernel: Kernel) -> Any:
    """What Triton makes of the first launch."""
    found: list[Any] = []
    with compiling_for(kernel.architecture, lambda _, made, *__: found.append(made)):
        _launch(kernel)
    return found[0]


def _launch(kernel: Kernel) -> None:
    matrix = _matrix(kernel)
    cell = new_faults("cpu")
    dtype = DTYPES[kernel.dtype]
    if isinstance(kernel.how, expand.Way):
        out = torch.empty((matrix.rows, matrix.cols), dtype=dtype)
        expand.launch(matrix, out, cell, 0, matrix.grid.tile_rows, kernel.how)
    else:
        x = torch.empty((kernel.how.tokens, matrix.cols), dtype=dtype)
        out = torch.empty((kernel.how.tokens, matrix.rows), dtype=dtype)
        linear.launch(matrix, x, None, out, cell, kernel.how)


def _matrix(kernel: Kernel) -> TorchMatrix:
    """Arrays of the right lengths; nobody looks into them."""
    rows, cols, group = 128, 256, 128
    lengths = fixed_bytes(kernel.codec, TileGrid(rows, cols), masked=kernel.masked, group=group)
    arrays: dict[str, Any] = {
        name: torch.empty(nbytes, dtype=torch.uint8) for name, nbytes in lengths.items()
    }
    arrays.setdefault("bitmap", None)
    arrays["values"] = torch.empty(1 << 16, dtype=torch.uint8)
    return TorchMatrix(
        kernel.codec,
        kernel.dtype,
        rows,
        cols,
        group=group if "scales" in arrays else 0,
        most_planes=PLANES,
        **arrays,
    )


def _tool(option: str, path: str) -> str:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [str(tools / "cuobjdump"), option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    arguments.add_argument("names", nargs="*", metavar="NAME", help="a kernel; all without one")
    chosen = arguments.parse_args()
    known = {kernel.name: kernel for kernel in kernels()}
    names = chosen.names or list(known)
    if strangers := [name for name in names if name not in known]:
        sys.exit(f"no such kernel: {', '.join(strangers)}")
    found = {}
    for name in names:
        found[name] = asdict(resources(known[name]))
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    # A kernel is a line: what changed is seen in a diff.
    print("{\n" + ",\n".join(f'  "{name}": {json.dumps(found[name])}' for name in names) + "\n}")


if __name__ == "__main__":
    main()
