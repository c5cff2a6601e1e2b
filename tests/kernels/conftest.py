"""Kernels one by one, and packed matrices to feed them."""

import os
import runpy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

if "TIERD_CPU_MODULE" in os.environ or "TIERD_ENCODE_MODULE" in os.environ:
    # Other builds of the C++ modules, with sanitizers: see kernels/README.md.
    runpy.run_path(str(Path(__file__).parents[1] / "native_modules.py"))

from tierd_kernels import dispatch, encode
from tierd_layouts import exponent_packed, packed_matrix, quantised
from tierd_layouts.packed_matrix import PackedMatrix

_random = runpy.run_path(str(Path(__file__).with_name("random_matrices.py")))
Form = tuple[str, bool]
Matrix = NDArray[Any]


def pytest_report_header() -> str:
    """Name the kernel under test in the header of every run."""
    return f"kernels here: {', '.join(dispatch.kernels())}; default: {dispatch.current().name}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Runs a test with the kernel and the encoder that its fixtures name, and no others: fixtures
    of a module need not end in the order in which they began, and one that set the kernel itself
    would then put back what another had set."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    name = parameters.get("kernel", parameters.get("native_kernel"))
    encoder = parameters.get("encoder")
    with pytest.MonkeyPatch.context() as patch:
        if name is not None:
            kernel = dispatch.kernels()[name]
            patch.setattr(dispatch, "current", lambda: kernel)
        if encoder is not None:
            patch.setattr(encode, "encoder_name", lambda: encoder)
        return (yield)


@pytest.fixture(scope="module", params=list(dispatch.kernels()))
def kernel(request: pytest.FixtureRequest) -> str:
    """The public functions run this kernel; a test with this fixture runs once for each."""
    return str(request.param)


@pytest.fixture(scope="module", params=[n for n in dispatch.kernels() if n != "reference"])
def native_kernel(request: pytest.FixtureRequest) -> str:
    """As `kernel`, without the reference."""
    return str(request.param)


@pytest.fixture(scope="module", params=encode.available())
def encoder(request: pytest.FixtureRequest) -> str:
    """The encoding functions use this instruction set, each in turn."""
    return str(request.param)


@pytest.fixture(
    scope="module",
    params=_random["FORMS"],
    ids=lambda form: f"{form[0]}-{'masked' if form[1] else 'dense'}",
)
def form(request: pytest.FixtureRequest) -> Form:
    """(codec, masked), each in turn."""
    found: Form = request.param
    return found


@pytest.fixture(scope="session")
def random_packed() -> Callable[..., PackedMatrix]:
    """See random_matrices.py."""
    make: Callable[..., PackedMatrix] = _random["random_packed"]
    return make


def packed(bits: Matrix, dtype: str, form: Form = ("raw", True)) -> PackedMatrix:
    """Return what the encoder of the form makes of `bits`."""
    codec, masked = form
    if codec == "raw":
        return packed_matrix.encode_raw(bits, dtype)
    if codec == "exponent-packed":
        return exponent_packed.encode(bits, dtype, masked=masked)
    return quantised.encode(bits, dtype, codec=codec, group=128, masked=masked)


@pytest.fixture(scope="session")
def pack() -> Callable[..., PackedMatrix]:
    """pack(bits, dtype, form): what the encoder makes of them; raw where no form is given."""
    return packed


SPECIAL = {
    "BF16": (0x8000, 0x0001, 0x807F, 0x7F80, 0xFF80, 0x7FC1, 0xFFFF),
    "F16": (0x8000, 0x0001, 0x83FF, 0x7C00, 0xFC00, 0x7E01, 0xFFFF),
    "F32": (0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00001, 0xFFFFFFFF),
}
"""Negative zero, denormals, infinities and NaNs with payloads."""


def to_bits(numbers: NDArray[np.float32], dtype: str) -> Matrix:
    """Return the bits of `numbers` in `dtype`; bfloat16 by truncation."""
    match dtype:
        case "BF16":
            return (numbers.view(np.uint32) >> 16).astype(np.uint16)
        case "F16":
            return numbers.astype(np.float16).view(np.uint16)
        case _:
            return numbers.view(np.uint32).copy()


@pytest.fixture(scope="session")
def random_bits() -> Callable[..., Matrix]:
    """random_bits(seed, rows, cols, dtype, density): any bit patterns, special ones among them."""

    def make(seed: int, rows: int, cols: int, dtype: str, density: float) -> Matrix:
        rng = np.random.default_rng(seed)
        element = np.uint32 if dtype == "F32" else np.uint16
        bits = rng.integers(0, np.iinfo(element).max, (rows, cols), element, endpoint=True)
        special = rng.random((rows, cols)) < 0.1
        bits[special] = rng.choice(np.array(SPECIAL[dtype], element), int(special.sum()))
        bits[rng.random((rows, cols)) >= density] = 0
        return bits

    return make


@pytest.fixture(scope="session")
def random_weights() -> Callable[..., Matrix]:
    """random_weights(seed, rows, cols, dtype, density): bits of numbers as in a trained layer."""

    @cache
    def make(seed: int, rows: int, cols: int, dtype: str, density: float = 0.5) -> Matrix:
        rng = np.random.default_rng(seed)
        numbers = rng.standard_normal((rows, cols), np.float32) * np.float32(0.02)
        numbers[rng.random((rows, cols)) >= density] = 0
        bits = to_bits(numbers, dtype)
        bits.flags.writeable = False
        return bits

    return make


@pytest.fixture(scope="session")
def packed_weights(random_weights: Callable[..., Matrix]) -> Callable[..., PackedMatrix]:
    """packed_weights(form, seed, rows, cols, dtype, density): `random_weights` in this form."""

    @cache
    def make(form: Form, *weights: Any) -> PackedMatrix:
        return packed(random_weights(*weights), weights[3], form)

    return make


@pytest.fixture(scope="session")
def random_x() -> Callable[..., Matrix]:
    """random_x(seed, tokens, cols, dtype): bits of activations, a few columns 1000 times larger."""

    def make(seed: int, tokens: int, cols: int, dtype: str) -> Matrix:
        rng = np.random.default_rng(seed)
        numbers = rng.standard_normal((tokens, cols), np.float32)
        numbers[:, rng.random(cols) < 0.002] *= 1000
        return to_bits(numbers, dtype)

    return make


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Any:
    """A torch.device, each in turn; most tests here need no torch, and import none."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU here")
    return torch.device(request.param)
