"""What the lossless codec saves, as the benchmark of the codecs counts it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tierd_kernels import encode
from tierd_tools.bench import codecs
from tierd_tools.prune import magnitude

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def _ratio(matrices: list[NDArray[np.uint16]], zeros: float) -> float:
    """Dense bytes over the bytes of the smallest lossless form, every array counted."""
    pruned = [magnitude(bits, "BF16", zeros) if zeros else bits for bits in matrices]
    stored = sum(min(encode.sizes(bits, "BF16").values()) for bits in pruned)
    return sum(bits.nbytes for bits in pruned) / stored


@pytest.mark.parametrize(("zeros", "least"), [(0.0, 1.38), (0.5, 2.6)])
def test_gaussian_weights_shrink_by_what_is_promised(zeros: float, least: float) -> None:
    assert _ratio([codecs.gaussian()], zeros) >= least


@pytest.mark.parametrize(("zeros", "least"), [(0.0, 1.38), (0.5, 2.55)])
def test_trained_weights_shrink_by_what_is_promised(zeros: float, least: float) -> None:
    matrices = list(codecs.trained())
    if not matrices:
        pytest.skip(codecs.NO_MODELS)
    assert _ratio(matrices, zeros) >= least
