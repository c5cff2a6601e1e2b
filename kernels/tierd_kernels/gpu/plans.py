"""Which variants of the fused product there are, and a sensible one where nothing was measured.

A finite list: every plan that can be chosen is in `candidates`, and each of them is tested in the
interpreter and compiled for every architecture. Which one is best is measured on the card
(`crossover.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tierd_layouts.tile_grid import TileGrid

MOST_TOKENS: Final = 64
TOKEN_BLOCKS: Final = (16, 32, 64)
"""Tokens that a program multiplies with a tile at once. Tensor cores take 16 at least."""
MOST_SPLITS: Final = 32
DATA_CENTER_PROCESSORS: Final = 132
"""Multiprocessors of an H100 or H200: for plans where no card is asked."""
_RESIDENT: Final = (4, 7, 14)
"""Programs for each multiprocessor that the splits of a plan aim at and do not pass: 4 to 7 of 16
tokens fit on one of sm_90 by their registers, and one more would begin a new round."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut into programs, and how each of them runs.

    tokens: of a program, one of TOKEN_BLOCKS. splits: parts that the columns are cut into, summed
    in order by a second kernel. warps, stages: Triton's, of a program; stages above 1 let it read
    the next tile while one is decoded. variant: of `decode_tile`, how values are fetched; or
    "cuda", the kernel of `cuda_product.py`.
    """

    tokens: int
    splits: int
    warps: int
    stages: int
    variant: str

    @property
    def order(self) -> tuple[int, int, bool]:
        """What decides the order of a row's additions. Plans that share it give equal bits."""
        return self.splits, self.warps, self.cuda

    @property
    def cuda(self) -> bool:
        """Whether it is the kernel in CUDA C++, not one of Triton's."""
        return self.variant == CUDA[2]


VARIANTS: Final = ((4, 1, "window"), (4, 3, "window"), (4, 3, "masked"), (4, 1, "gather"))
"""(warps, stages, variant) that can be chosen; the first where nothing was measured. 4 warps are
what the tensor cores of sm_90 take; with 2 a program of 64 tokens has too few registers."""
CUDA: Final = (4, 1, "cuda")
"""The same of the kernel in CUDA C++, for the matrices and where `cuda_product.usable` says so."""
CUDA_TOKENS: Final = {"exponent-packed": 64, "int8": 32}
"""The codecs that it knows, and the most tokens that a program of it has registers for."""


def token_block(tokens: int) -> int:
    """The smallest of TOKEN_BLOCKS that holds so many tokens."""
    return next(block for block in TOKEN_BLOCKS if tokens <= block)


def candidates(
    grid: TileGrid,
    codec: str,
    tokens: int,
    processors: int = DATA_CENTER_PROCESSORS,
    cuda: bool = False,
) -> list[Plan]:
    """All plans that are worth measuring for a matrix and 1 to MOST_TOKENS tokens.

    The same splits for every number of tokens: see `Plan.order`. cuda: with those of CUDA.
    """
    block = token_block(tokens)
    splits = sorted({_splits(grid, resident * processors) for resident in _RESIDENT})
    variants = [Plan(block, 1, *each) for each in VARIANTS if worth(codec, *each)]
    if cuda:
        variants.append(Plan(min(block, CUDA_TOKENS[codec]), 1, *CUDA))
    return [replace(plan, splits=many) for many in splits for plan in variants]


def default_plan(grid: TileGrid, tokens: int, processors: int = DATA_CENTER_PROCESSORS) -> Plan:
    """A plan for a matrix that was never measured."""
    return Plan(token_block(tokens), _splits(grid, _RESIDENT[1] * processors), *VARIANTS[0])


def worth(codec: str, warps: int, stages: int, variant: str) -> bool:
    """Whether such a program differs from the others of the codec.

    Triton reads nothing ahead where there are loops inside, as for escapes.
    """
    if codec == "exponent-packed":
        return stages == 1 and variant == "window"
    return variant != "gather" or codec == "raw"


def _splits(grid: TileGrid, programs: int) -> int:
    """How many parts of the columns give so many programs at most; none is empty."""
    wanted = programs // max(grid.tile_rows, 1)
    return max(1, min(wanted, grid.tile_cols, MOST_SPLITS))
