"""The product in CUDA C++ is the exact one, for every shape, and finds what Triton's finds.

nvcc compiles it, and a machine for PTX executes it (`ptx/`), which watches every access and every
race; on a GPU (TIERD_KERNELS_DEVICE=cuda) CuPy compiles and launches it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.kernels.gpu.products import exact, numbers
from tests.kernels.gpu.ptx.machine import kernel as machine_kernel
from tests.kernels.gpu.ptx.machine import launch as machine_launch
from tests.kernels.gpu.ptx.triton_launch import array
from tests.kernels.random_matrices import TAME
from tests.kernels.torch_expansions import WRONG_ESCAPES, tile_of_escapes
from tierd_kernels import KernelError, PackedMatrix, reference
from tierd_kernels.faults import NO_FAULT, fault_text, new_faults
from tierd_kernels.gpu import cuda_product, nvcc
from tierd_kernels.gpu.linear import linear
from tierd_kernels.gpu.plans import CUDA, CUDA_TOKENS, Plan
from tierd_kernels.torch_matrix import TorchMatrix, from_arrays

if TYPE_CHECKING:
    from tests.kernels.gpu.ptx.memory import Array

Matrices = Callable[..., PackedMatrix]
Bits = Callable[..., Any]

DEVICE = os.environ.get("TIERD_KERNELS_DEVICE", "")
ARCHITECTURE = int(DEVICE.removeprefix("sm_")) if DEVICE.startswith("sm_") else 90
MOST_ERROR = 1e-6
"""RMS of the error relative to the RMS of the exact product: a tenth of what is promised."""
FORM = ("exponent-packed", True)
PLAN = Plan(16, 1, *CUDA)
INT8 = ("int8", True)
NAMES = ("bitmap", "offsets", "heads", "scales", "values", "x", "parts", "faults")
"""Of the arguments that are addresses, in their order."""


@pytest.fixture
def arrays(monkeypatch: pytest.MonkeyPatch) -> dict[int, Array]:
    """Of the launches: what each address is of. The kernel runs on the machine, or on a GPU."""
    known: dict[int, Array] = {}
    if DEVICE == "cuda":
        pytest.importorskip("cupy", reason="no CuPy here: the product in CUDA C++ is not run")
        return known
    if not nvcc.found():
        pytest.skip("no nvcc here: the product in CUDA C++ is not compiled, and not run")

    def loaded(options: tuple[str, ...], _device: torch.device) -> cuda_product.Launch:
        kernel = machine_kernel(_ptx(options), cuda_product.NAME)

        def launch(grid: Any, threads: Any, arguments: Any) -> None:
            given = [known[int(address)] for address in arguments[: len(NAMES)] if address]
            machine_launch(kernel, grid, threads, arguments, given)

        return launch

    address = cuda_product._address

    def noted(tensor: torch.Tensor | None) -> Any:
        if tensor is None:
            return address(tensor)
        written = tensor.dtype in (torch.float32, torch.int64)
        found = address(tensor)
        known[int(found)] = array(f"{tensor.dtype} {list(tensor.shape)}", tensor, written)
        return found

    monkeypatch.setattr(cuda_product, "loaded", loaded)
    monkeypatch.setattr(cuda_product, "_address", noted)
    return known


@cache
def _ptx(options: tuple[str, ...]) -> str:
    return nvcc.compiled(options, ARCHITECTURE, "ptx").decode()


def packed(random_packed: Matrices, seed: int, rows: int, cols: int, **how: Any) -> PackedMatrix:
    """Random, with as many planes as the kernel decodes."""
    how = {"tops": TAME, "most_planes": cuda_product.MOST_PLANES} | how
    dtype, form = how.pop("dtype", "BF16"), how.pop("form", FORM)
    return random_packed(seed, rows, cols, dtype, form, **how)


def there(matrix: PackedMatrix, device: torch.device) -> TorchMatrix:
    return replace(from_arrays(matrix, device), most_planes=cuda_product.MOST_PLANES)


def near(ours: torch.Tensor, exactly: Any) -> bool:
    difference = ours.double().cpu().numpy() - exactly
    return bool(np.mean(difference**2) <= MOST_ERROR**2 * np.mean(exactly**2))


def product(
    matrix: TorchMatrix, x: torch.Tensor, plan: Plan = PLAN, faults: torch.Tensor | None = None
) -> torch.Tensor:
    """In float32, on memory that nothing has written to."""
    out = torch.full((len(x), matrix.rows), torch.nan, device=matrix.device)
    return linear(matrix, x, out=out, plan=plan, faults=faults)


SHAPES = [
    # rows, cols, tokens, splits, tokens of a program
    (64, 64, 16, 1, 16),
    (1, 1, 1, 1, 16),
    (63, 65, 3, 2, 16),
    (130, 200, 5, 1, 16),
    (70, 600, 17, 2, 16),
    (65, 330, 33, 1, 32),
    (64, 192, 64, 1, 64),
]


@pytest.mark.parametrize("form", [FORM, INT8], ids=["packed", "int8"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sum_before_the_rounding_is_exact_within_the_promise(
    arrays: object,
    device: torch.device,
    random_packed: Matrices,
    random_x: Bits,
    shape: tuple[int, ...],
    dtype: str,
    form: tuple[str, bool],
) -> None:
    """Tiles are empty, dense or half filled, and have no, one, some or only escapes."""
    rows, cols, tokens, splits, block = shape
    block = min(block, CUDA_TOKENS[form[0]])
    matrix = packed(random_packed, rows, rows, cols, dtype=dtype, form=form)
    x = numbers(random_x(1, tokens, cols, dtype), dtype, device)
    ours = product(there(matrix, device), x, Plan(block, splits, *CUDA))
    assert near(ours, exact(matrix, x))


@pytest.mark.parametrize("planes", range(cuda_product.MOST_PLANES + 1))
def test_every_number_of_planes_is_decoded(
    arrays: object, device: torch.device, random_packed: Matrices, random_x: Bits, planes: int
) -> None:
    matrix = packed(random_packed, 3, 64, 200, most_planes=planes)
    x = numbers(random_x(1, 2, 200, "BF16"), "BF16", device)
    ours = product(replace(there(matrix, device), most_planes=planes), x)
    assert near(ours, exact(matrix, x))


@pytest.mark.parametrize("group", [64, 192, 64 * (2**31 - 1)])
def test_every_group_has_its_own_scales(
    arrays: object, device: torch.device, random_packed: Matrices, random_x: Bits, group: int
) -> None:
    """Warps begin within a group, and have more than one."""
    matrix = packed(random_packed, 3, 64, 1000, form=INT8, group=group)
    x = numbers(random_x(3, 2, 1000, "BF16"), "BF16", device)
    for splits in (1, 3):
        ours = product(there(matrix, device), x, replace(PLAN, splits=splits))
        assert near(ours, exact(matrix, x)), splits


def test_every_level_is_multiplied_unrounded(
    arrays: object, device: torch.device, random_packed: Matrices
) -> None:
    """And alone, so that each can be seen."""
    matrix = packed(random_packed, 3, 64, 64, density=1.0, form=INT8)
    matrix.values[:4096] = np.tile(np.arange(256, dtype=np.uint8), 16)
    matrix.bitmap[:] = ~np.uint64(0)  # type: ignore[index]
    matrix.scales[:] = 0x3F80  # type: ignore[index]
    x = torch.eye(64, dtype=torch.bfloat16, device=device)
    ours = product(there(matrix, device), x, replace(PLAN, tokens=32)).cpu().numpy()
    assert np.array_equal(ours.T, matrix.values[:4096].view(np.int8).reshape(64, 64))


def test_rows_of_x_may_lie_apart_and_begin_anywhere(
    arrays: object, device: torch.device, random_packed: Matrices, random_x: Bits
) -> None:
    matrix = packed(random_packed, 6, 64, 136)
    for apart, first in ((2, 0), (1, 1)):
        room = numbers(random_x(6, 6, 138, "BF16"), "BF16", device)
        x = room[::apart, first : first + 136]
        assert near(product(there(matrix, device), x), exact(matrix, x))


def test_a_result_depends_on_the_order_alone_not_on_how_many_tokens_there_are(
    arrays: object, device: torch.device, random_packed: Matrices, random_x: Bits
) -> None:
    matrix = there(packed(random_packed, 5, 64, 600), device)
    x = numbers(random_x(5, 33, 600, "BF16"), "BF16", device)
    together = product(matrix, x, replace(PLAN, tokens=64))
    for block in (16, 32):
        assert torch.equal(product(matrix, x, replace(PLAN, tokens=block)), together)
    assert torch.equal(product(matrix, x[4:5])[0], together[4])


def test_an_infinite_x_gives_nan_where_it_meets_a_zero(
    arrays: object, device: torch.device, pack: Matrices
) -> None:
    bits = np.full((64, 70), 0x3F80, np.uint16)
    bits[5, 66] = 0
    x = torch.ones((2, 70), dtype=torch.bfloat16, device=device)
    x[1, 66] = torch.inf
    ours = product(there(pack(bits, "BF16", FORM), device), x).cpu()
    assert torch.isfinite(ours[0]).all()
    assert ours[1, 5].isnan()
    assert (ours[1, torch.arange(64) != 5] == torch.inf).all()


# ---------------------------------------------------------------- wrong contents


def no_bits(matrix: PackedMatrix, tile: int) -> None:
    matrix.bitmap[tile * 64 : tile * 64 + 64] = 0  # type: ignore[index]


def bit_outside(matrix: PackedMatrix, tile: int) -> None:
    matrix.bitmap[tile * 64] |= np.uint64(1 << 63)  # type: ignore[index]


def too_many_planes(matrix: PackedMatrix, tile: int) -> None:
    matrix.heads[tile] += 8 << 8  # type: ignore[index]


def base_too_high(matrix: PackedMatrix, tile: int) -> None:
    matrix.heads[tile] |= 0xFF  # type: ignore[index]
    matrix.heads[tile] |= 1 << 8  # type: ignore[index]


def more_escapes(matrix: PackedMatrix, tile: int) -> None:
    matrix.heads[tile] += 5 << 16  # type: ignore[index]


def offset_far_away(matrix: PackedMatrix, tile: int) -> None:
    matrix.offsets[tile + 1] = 2**32 - 1


def offset_descends(matrix: PackedMatrix, tile: int) -> None:
    matrix.offsets[tile + 1] = 0


WRONG = [
    (no_bits, "its head cannot be"),
    (bit_outside, "bitmap has bits outside the matrix"),
    (too_many_planes, "its head cannot be"),
    (base_too_high, "its head cannot be"),
    (more_escapes, "offsets do not fit its record"),
    (offset_far_away, "offsets do not fit its record"),
    (offset_descends, "offsets do not fit its record"),
]
WRONG_LEVELS = [
    (no_bits, "offsets do not fit its record"),
    (bit_outside, "bitmap has bits outside the matrix"),
    (offset_far_away, "offsets do not fit its record"),
    (offset_descends, "offsets do not fit its record"),
]
"""Int8 has no heads: a tile without bits is one whose offsets do not fit."""


@pytest.mark.parametrize(
    ("form", "spoil", "reason"),
    [(form, *each) for form, wrong in ((FORM, WRONG), (INT8, WRONG_LEVELS)) for each in wrong],
    ids=lambda one: one[0] if isinstance(one, tuple) else getattr(one, "__name__", ""),
)
def test_a_wrong_tile_counts_as_zeros_and_is_named(
    arrays: object,
    device: torch.device,
    random_packed: Matrices,
    random_x: Bits,
    form: tuple[str, bool],
    spoil: Callable[[PackedMatrix, int], None],
    reason: str,
) -> None:
    """Tile 5 of nine: the last one of its row, which has 2 columns."""
    if form == FORM:
        matrix = copied(random_packed, 130, 130)
    else:
        matrix = packed(random_packed, 4, 130, 130, form=form)
    assert matrix.offsets[5] < matrix.offsets[6]
    weights = reference.weights(matrix)
    spoil(matrix, 5)
    spoiled = [5, 6] if "offset" in spoil.__name__ else [5]  # an offset is of two tiles
    for tile in spoiled:
        top, left = tile // 3 * 64, tile % 3 * 64
        weights[top : top + 64, left : left + 64] = 0
    x = numbers(random_x(6, 2, 130, "BF16"), "BF16", device)
    faults = new_faults(device)
    ours = product(there(matrix, device), x, faults=faults)
    assert near(ours, x.double().cpu().numpy() @ weights.T)
    assert fault_text(int(faults)) == f"tile 5: {reason}"


def copied(random_packed: Matrices, rows: int, cols: int) -> PackedMatrix:
    """With arrays that can be written to, half filled tiles, and escapes in the one of spoiling."""
    for seed in range(100):
        matrix = packed(random_packed, seed, rows, cols)
        if matrix.heads[5] >> 16 > 40 and matrix.heads[5] & 0xFF00:  # type: ignore[index]
            return matrix
    raise AssertionError("no tile with escapes")


ROW = np.array([2**64 - 1] + [0] * 63, np.uint64)
"""The bitmap of a tile of escapes, for there are only masked matrices in CUDA."""
PADS = [0] * 40
"""Pads of more escapes than a warp has lanes."""


@pytest.mark.parametrize(
    ("ordinals", "pads"),
    [*WRONG_ESCAPES, ([*range(38), 60, 39], PADS), ([*range(39), 64], PADS)],
)
def test_escapes_that_do_not_ascend_are_found_before_they_are_followed(
    arrays: object, device: torch.device, ordinals: list[int], pads: list[int]
) -> None:
    matrix = replace(tile_of_escapes(ordinals, pads), bitmap=ROW)
    faults = new_faults(device)
    x = torch.ones((1, 64), dtype=torch.bfloat16, device=device)
    product(there(matrix, device), x, faults=faults)
    assert fault_text(int(faults)) == "tile 0: escapes do not ascend within its elements"


def test_escapes_that_ascend_are_followed(arrays: object, device: torch.device) -> None:
    matrix = replace(tile_of_escapes([*range(24, 64)], PADS), bitmap=ROW)
    x = torch.ones((1, 64), dtype=torch.bfloat16, device=device)
    assert near(product(there(matrix, device), x), exact(matrix, x))


def test_a_cell_stays_empty_while_nothing_is_wrong(
    arrays: object, device: torch.device, random_packed: Matrices
) -> None:
    faults = new_faults(device)
    x = torch.ones((1, 64), dtype=torch.bfloat16, device=device)
    product(there(packed(random_packed, 9, 64, 64), device), x, faults=faults)
    assert int(faults) == NO_FAULT


# ---------------------------------------------------------------- where it is none


def test_what_it_cannot_multiply_is_refused(device: torch.device, random_packed: Matrices) -> None:
    x = torch.ones((1, 64), dtype=torch.bfloat16, device=device)
    matrix = there(packed(random_packed, 9, 64, 64), device)
    shifted = torch.zeros(matrix.values.numel() + 4, dtype=torch.uint8, device=device)[4:]
    refused = {
        "it is raw, not one of exponent-packed, int8": from_arrays(
            random_packed(1, 64, 64, "BF16", ("raw", True)), device
        ),
        "it is in dense form, not masked": from_arrays(
            random_packed(1, 64, 64, "BF16", ("exponent-packed", False)), device
        ),
        "it may have 8 planes, 4 at most": replace(matrix, most_planes=8),
    }
    for text, unfit in refused.items():
        assert not cuda_product.usable(unfit)
        with pytest.raises(KernelError, match=text):
            linear(unfit, x, plan=PLAN)
    with pytest.raises(KernelError, match="values does not start on a multiple of 16 bytes"):
        linear(replace(matrix, values=shifted), x, plan=PLAN)
    levels = there(packed(random_packed, 9, 64, 64, form=INT8), device)
    with pytest.raises(KernelError, match="for 64 tokens at once, int8 has 32 in CUDA"):
        linear(levels, x, plan=replace(PLAN, tokens=64))


def test_cupy_compiles_what_the_matrix_needs_and_launches_it_on_the_stream_of_torch(
    random_packed: Matrices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CuPy, played: the names and arguments are those of CuPy 14.2."""
    said: list[Any] = []

    class RawModule:
        def __init__(self, *, code: str, options: tuple[str, ...]) -> None:
            said.append((code == cuda_product.SOURCE.read_text(), options))

        def get_function(self, name: str) -> Callable[..., None]:
            return lambda grid, block, args: said.append((name, grid, block, args))

    class Stream:
        @staticmethod
        def from_external(stream: object) -> nullcontext[None]:
            said.append(stream)
            return nullcontext()

    cuda = SimpleNamespace(Stream=Stream, Device=lambda _: nullcontext())
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, RawModule=RawModule))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    forget_what_was_loaded()
    matrix = there(packed(random_packed, 9, 64, 600, dtype="F16"), torch.device("cpu"))
    x, parts = torch.ones((17, 600)).half(), torch.empty((2, 17, 64))
    assert cuda_product.usable(matrix)
    cuda_product.multiply(matrix, x, parts, new_faults("cpu"), Plan(16, 2, *CUDA))
    compiled, stream, (name, grid, block, arguments) = said
    assert compiled == (True, ("-std=c++17", "-DINT8=0", "-DPLANES=4", "-DF16=1", "-DTOKENS=16"))
    assert stream == "stream of cpu"
    assert (name, grid, block) == ("multiply_packed", (1, 2, 2), (128, 1, 1))
    assert [type(each) for each in arguments[:8]] == [np.uint64] * 8
    assert [int(each) for each in arguments[10:]] == [64, 600, 17, 600, 1, 2]
    forget_what_was_loaded()


@pytest.mark.parametrize("said", ["no attribute 'from_external'", "numpy.dtype size changed"])
def test_a_cupy_that_is_too_old_or_does_not_load_is_none(
    device: torch.device, random_packed: Matrices, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if "size" in said:
                raise ValueError(said)
            return SimpleNamespace(Stream=SimpleNamespace())

    monkeypatch.setitem(sys.modules, "cupy", Broken("cupy"))
    forget_what_was_loaded()
    matrix = there(packed(random_packed, 9, 64, 64), device)
    assert not cuda_product.usable(matrix)
    with pytest.raises(KernelError, match=f"needs CuPy 14 or later: .*{said}"):
        cuda_product.loaded(cuda_product.options(matrix, 16), device)


def forget_what_was_loaded() -> None:
    for cached in (cuda_product.loaded, cuda_product._loads):
        cached.cache_clear()


def test_without_cupy_it_is_no_candidate_which_is_said_once_and_asking_for_it_is_an_error(
    device: torch.device,
    random_packed: Matrices,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    forget_what_was_loaded()
    matrix = there(packed(random_packed, 9, 64, 64), device)
    with caplog.at_level("INFO"):
        assert not cuda_product.usable(matrix)
        assert not cuda_product.usable(matrix)
    assert len(caplog.records) == 1
    assert "the CUDA product needs CuPy 14" in caplog.text
    with pytest.raises(KernelError, match="the CUDA product needs CuPy 14"):
        linear(matrix, torch.ones((1, 64), dtype=torch.bfloat16, device=device), plan=PLAN)
