"""What Triton compiles runs: every variant that is recorded, its PTX executed (`ptx/`).

Where TIERD_KERNELS_DEVICE is sm_80, sm_90 or sm_100: `make ptx`. In every `make test` the variants
that are taken by default are run by `ptx/test_our_kernels.py`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.kernels.gpu.products import error, exact, single
from tests.kernels.gpu.ptx import machine
from tests.kernels.gpu.ptx.errors import PtxError
from tests.kernels.random_matrices import TAME
from tests.kernels.torch_expansions import bits_of, dirty, specified
from tierd_kernels import PackedMatrix
from tierd_kernels.gpu import compiled, plans
from tierd_kernels.gpu.expand import DEFAULT_WAY, Way, expand
from tierd_kernels.gpu.linear import linear
from tierd_kernels.gpu.plans import Plan
from tierd_kernels.torch_matrix import DTYPES, TorchMatrix, from_arrays, measured

if TYPE_CHECKING:
    from tierd_kernels.gpu.compiled import Kernel

Matrices = Callable[..., PackedMatrix]

DEVICE = os.environ.get("TIERD_KERNELS_DEVICE", "")
pytestmark = pytest.mark.skipif(
    not DEVICE.startswith("sm_"), reason="for TIERD_KERNELS_DEVICE=sm_80, sm_90, sm_100: make ptx"
)
MOST_ERROR = 1e-6
"""RMS, of the sums before they are rounded; the machine's tensor cores do not cut off."""


def variants() -> list[Kernel]:
    """What is recorded for this processor; for others than the measured one it is the default."""
    here = [kernel for kernel in compiled.kernels() if f"sm_{kernel.architecture}" == DEVICE]
    return [kernel for kernel in here if not kernel.of_cuda]  # test_cuda_product.py runs those


def product(matrix: PackedMatrix, plan: Plan, tokens: int) -> float:
    """The error of x @ W.T."""
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((tokens, matrix.cols)))
    x = x.to(DTYPES[matrix.dtype])
    there = measured(from_arrays(matrix))
    ours = linear(there, x, out=single(matrix.rows, tokens, there.device), plan=plan)
    return error(ours, exact(matrix, x))


def expanded(matrix: PackedMatrix, way: Way) -> Any:
    there: TorchMatrix = measured(from_arrays(matrix))
    out = dirty(there, there.device, matrix.rows)
    expand(there, out, way=way)
    return bits_of(out)


@pytest.mark.parametrize("variant", variants(), ids=lambda kernel: kernel.name)
def test_a_recorded_variant_gives_what_the_reference_says(
    variant: Kernel, random_packed: Matrices
) -> None:
    """Several tiles one after another, edges, records far from the end of values, escapes."""
    form = variant.codec, variant.masked
    if isinstance(variant.how, Way):
        matrix = random_packed(6, 66, 200, variant.dtype, form, 0.9)
        np.testing.assert_array_equal(expanded(matrix, variant.how), specified(matrix))
        return
    matrix = random_packed(6, 70, 452, variant.dtype, form, tops=TAME)
    plan = replace(variant.how, splits=2)
    assert product(matrix, plan, variant.how.tokens - 3) < MOST_ERROR


@pytest.mark.parametrize("shape", [(70, 1), (1, 1), (1, 70)], ids=str)
def test_a_matrix_of_a_single_row_or_column_compiles_and_is_right(
    random_packed: Matrices, shape: tuple[int, int]
) -> None:
    """Triton compiles a kernel of its own for an argument that is 1."""
    matrix = random_packed(6, *shape, "BF16", ("exponent-packed", False), tops=TAME)
    plan = plans.default_plan(from_arrays(matrix).grid, 3)
    assert product(matrix, plan, 3) < MOST_ERROR
    np.testing.assert_array_equal(expanded(matrix, DEFAULT_WAY), specified(matrix))


# ----------------------------------------------------------------------------------- broken ones


class Broken:
    """Leaves out one of the lines that match, in every kernel that is launched."""

    def __init__(self, pattern: str, number: int) -> None:
        self._pattern = re.compile(rf"\n\s*{pattern}[^\n]*;")
        self._number = number
        self.found = False

    def __call__(self, text: str) -> str:
        matches = list(self._pattern.finditer(text))
        if self._number >= len(matches):
            return text
        self.found = True
        match = matches[self._number]
        return text[: match.start()] + "\n" + text[match.end() :]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, int], Broken]]:
    """broken(pattern, number): from now on launches leave out that line."""
    sound = machine.kernel

    def break_it(pattern: str, number: int) -> Broken:
        change = Broken(pattern, number)
        monkeypatch.setattr(machine, "kernel", lambda text: sound(change(text)))
        return change

    yield break_it
    monkeypatch.undo()


def test_a_product_without_one_of_its_barriers_mostly_has_a_race(
    broken: Callable[[str, int], Broken], random_packed: Matrices
) -> None:
    """Mostly: some order what only other contents lead to, or what another one orders too."""
    matrix = random_packed(5, 64, 200, "BF16", ("raw", True), tops=TAME)
    plan = Plan(16, 1, *plans.VARIANTS[0])
    races = []
    for number in range(100):
        change = broken(r"bar\.sync", number)
        try:
            product(matrix, plan, 5)
            races.append("")
        except PtxError as error:
            races.append(str(error))
        if not change.found:
            break
    assert len(races) > 5
    assert sum("with no bar" in race for race in races) > len(races) / 2, races


NEEDED = {
    "sm_90": {
        r"fence\.proxy\.async": "without fence.proxy.async",
        r"wgmma\.fence": "no wgmma.fence since",
        r"wgmma\.wait_group": "was not written",
    },
    "sm_100": {
        r"fence\.proxy\.async": "without fence.proxy.async",
        r"tcgen05\.wait::st": "warps did not wait for",
        r"tcgen05\.wait::ld": "warps did not wait for",
        r"@%p\d+ tcgen05\.commit": "waits at an mbarrier for ever",
        r"@%p\d+ tcgen05\.dealloc": "still allocated at its end",
    },
}
"""Lines of a product that only wait, and what their absence is found as."""


@pytest.mark.parametrize("pattern", NEEDED.get(DEVICE, ()))
def test_a_product_that_does_not_wait_for_its_tensor_cores_is_an_error(
    broken: Callable[[str, int], Broken], random_packed: Matrices, pattern: str
) -> None:
    change = broken(pattern, 0)
    matrix = random_packed(5, 64, 200, "BF16", ("raw", True))
    with pytest.raises(PtxError, match=NEEDED[DEVICE][pattern]):
        product(matrix, Plan(16, 1, *plans.VARIANTS[0]), 5)
    assert change.found


def test_a_copy_that_is_not_waited_for_is_not_read(
    broken: Callable[[str, int], Broken], random_packed: Matrices
) -> None:
    matrix = random_packed(5, 64, 330, "BF16", ("raw", True), tops=TAME)
    staged = next(each for each in plans.VARIANTS if each[1] > 1)
    change = broken(r"cp\.async\.wait_group", 0)
    with pytest.raises(PtxError, match=r"of a cp\.async under way"):
        product(matrix, Plan(16, 1, *staged), 5)
    assert change.found


def test_an_address_behind_an_array_is_an_error(
    broken: Callable[[str, int], Broken], random_packed: Matrices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every load, moved by 16 MiB."""
    sound = machine.kernel
    matrix = random_packed(5, 64, 70, "BF16", ("raw", True))

    def moved(text: str) -> Any:
        return sound(re.sub(r"(ld\.global[^;]*) \+ 0 \]", rf"\1 + {1 << 24} ]", text))

    monkeypatch.setattr(machine, "kernel", moved)
    with pytest.raises(PtxError, match=r"ld\.global.* of [a-z]+ at 0x"):
        expanded(matrix, Way("window", 4))
