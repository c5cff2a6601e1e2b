"""Which plan is best for a matrix on this card, and up to how many tokens it beats expanding.

Measured once for each shape, codec, dtype and density on a card, with the first such matrix that is
met, and kept in a file. All plans that a matrix is given share one `order`: a token's result then
does not depend on how many tokens are with it.
"""

from __future__ import annotations

import logging
import math
import threading
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Final, Protocol

import torch
from torch.nn import functional

from tierd_kernels.errors import KernelError
from tierd_kernels.faults import NO_FAULT, fault_text, new_faults
from tierd_kernels.gpu import cuda_product
from tierd_kernels.gpu.crossover_file import CrossoverFile, Table, default_path
from tierd_kernels.gpu.expand import expand
from tierd_kernels.gpu.linear import ELEMENTS, linear, processors
from tierd_kernels.gpu.plans import Plan, candidates, default_plan
from tierd_kernels.gpu.trial import Trial
from tierd_kernels.torch_matrix import DTYPES, TorchMatrix

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKEN_CLASSES: Final = (1, 2, 4, 8, 16, 32, 64)
"""What is measured; another number of tokens is taken as the next class above."""
DECODING: Final = (1, 16)
"""The classes that decide on the order of additions: one client that decodes, and a batch."""
_UNMEASURED_TOKENS: Final = 16
"""Fused up to here where there is no memory to measure."""
_CUDA_AHEAD: Final = 1.1
_ROUNDS: Final = 9
_FLUSHED_BYTES: Final = 256 << 20
"""Written before each round: in a model no matrix is read from the GPU's cache."""


_log = logging.getLogger(__name__)


class Timer(Protocol):
    """What measures. plan: what `run` uses for so many tokens; None: it expands and multiplies."""

    def __call__(self, plan: Plan | None, tokens: int, run: Callable[[], object]) -> float:
        """Seconds of one `run`."""


class Tried(Protocol):
    """What looks whether kernels are right before their times count: `trial.Trial`."""

    def expansion(self) -> None:
        """Raise WrongKernel."""

    def product(self, plan: Plan) -> None:
        """Raise WrongKernel."""


class Crossovers:
    """Of one device. Thread-safe; the first choice for a new kind of matrix measures and waits.

    While it measures it has a dense matrix and 256 MiB on the device beside its own, and other work
    there falsifies what it finds. Where they do not fit it says so once and does not measure: 16
    tokens are fused then. Each kernel is tried before: one that computes something else is a
    WrongKernel, and nothing is kept. timer, path, trial: for tests; the GPU's events, the user's
    cache, `Trial`.
    """

    def __init__(
        self,
        device: torch.device | str,
        timer: Timer | None = None,
        path: Path | None = None,
        trial: Callable[[TorchMatrix], Tried] = Trial,
    ) -> None:
        self._device = torch.device(device)
        self._timer = timer
        self._trial = trial
        if timer is None and self._device.type != "cuda":
            raise KernelError(f"crossovers are measured on a GPU, not on {self._device}")
        self._file = CrossoverFile(path or default_path(self._device))
        self._tables: dict[str, Table] | None = None
        self._plans: dict[str, dict[int, Plan | None]] = {}
        self._lock = threading.Lock()

    def choice(self, matrix: TorchMatrix, tokens: int) -> Plan | None:
        """The plan for `linear`; None: expand the matrix, then multiply.

        Raises KernelError, WrongKernel.
        """
        if not 0 < tokens <= TOKEN_CLASSES[-1] or matrix.dtype not in ELEMENTS:
            return None
        if not matrix.grid.tiles:
            return None
        key = kind(matrix)
        plans = self._plans.get(key)
        if plans is None:
            with self._lock:
                plans = self._plans[key] = self._decided(key, matrix)
        return plans[next(most for most in TOKEN_CLASSES if tokens <= most)]

    def table(self, matrix: TorchMatrix) -> Table:
        """The seconds behind the choices for such a matrix. Raises KernelError, WrongKernel."""
        with self._lock:
            return self._table(kind(matrix), matrix)

    def _decided(self, key: str, matrix: TorchMatrix) -> dict[int, Plan | None]:
        try:
            return decide(self._table(key, matrix))
        except torch.OutOfMemoryError as error:
            _log.warning(
                "%s is not measured on %s, up to %d tokens are fused: %s",
                key,
                self._device,
                _UNMEASURED_TOKENS,
                error,
            )
            count = processors(matrix.device)
            return {
                tokens: default_plan(matrix.grid, tokens, count)
                if tokens <= _UNMEASURED_TOKENS
                else None
                for tokens in TOKEN_CLASSES
            }

    def _table(self, key: str, matrix: TorchMatrix) -> Table:
        if self._tables is None:
            self._tables = self._file.read()
        found = self._tables.get(key)
        if found is None or not _whole(found, matrix):
            try:
                _try(matrix, self._trial(matrix))
                found = _measured(matrix, self._timer or CudaTimer(self._device))
            finally:
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()  # what it had is for others: the daemon, the user
            self._tables[key] = found
            self._file.add(key, found)
        return found


def kind(matrix: TorchMatrix) -> str:
    """What matrices that take the same time have in common: form, shape, and about what they weigh.

    The weight is that of the stored values, in sixteenths of a byte for each element. With the
    kernel in CUDA C++ or without: also of one form some matrices have it, some have not.
    """
    form = "dense form" if matrix.bitmap is None else "masked"
    weight = round(16 * matrix.values.numel() / max(matrix.rows * matrix.cols, 1))
    return (
        f"{matrix.codec} {form} {matrix.dtype} [{matrix.rows}, {matrix.cols}] "
        f"group {matrix.group} weight {weight}" + " cuda" * cuda_product.usable(matrix)
    )


def decide(table: Table) -> dict[int, Plan | None]:
    """The plan for each class of tokens, None from the first one for which expanding is not slower.

    All have the `order` with which the decoding classes together are fastest: one of CUDA only if
    by _CUDA_AHEAD, as a second compiler in the process wants a reason.
    """
    fused = {
        tokens: {plan: seconds for plan, seconds in times.items() if plan is not None}
        for tokens, times in table.items()
    }
    orders = {plan.order for times in fused.values() for plan in times}
    order = min(orders, key=lambda order: sum(_weighed(fused[few], order) for few in DECODING))
    plans: dict[int, Plan | None] = {}
    ahead = True
    for tokens in TOKEN_CLASSES:
        best, plan = _log_best(fused[tokens], order)
        ahead = ahead and plan is not None and best < math.log(table[tokens][None])
        plans[tokens] = plan if ahead else None
    return plans


def _weighed(times: dict[Plan, float], order: tuple[object, ...]) -> float:
    """As `_log_best`, but as it counts when one is chosen: longer by _CUDA_AHEAD for CUDA."""
    least, plan = _log_best(times, order)
    return least + math.log(_CUDA_AHEAD) if plan is not None and plan.cuda else least


def _log_best(times: dict[Plan, float], order: tuple[object, ...]) -> tuple[float, Plan | None]:
    """The logarithm of the least time of the plans of this order, and that plan."""
    plans = [plan for plan in times if plan.order == order]
    if not plans:
        return math.inf, None
    best = min(plans, key=times.__getitem__)
    return math.log(times[best]), best


def _whole(table: Table, matrix: TorchMatrix) -> bool:
    """Whether a table, which may be of a file, has just what would be measured for the matrix."""
    return set(table) == set(TOKEN_CLASSES) and all(
        set(times) == {None, *_plans(matrix, tokens)} for tokens, times in table.items()
    )


def _plans(matrix: TorchMatrix, tokens: int) -> list[Plan]:
    cuda = cuda_product.usable(matrix)
    return candidates(matrix.grid, matrix.codec, tokens, processors(matrix.device), cuda)


def _try(matrix: TorchMatrix, trial: Tried) -> None:
    """Everything that is going to be measured, but for the number of splits. Raises WrongKernel."""
    trial.expansion()
    plans = {
        replace(plan, splits=1): plan for tokens in TOKEN_CLASSES for plan in _plans(matrix, tokens)
    }
    for plan in plans.values():
        trial.product(plan)


def _measured(matrix: TorchMatrix, timer: Timer) -> Table:
    """Time everything with this matrix. Raises KernelError where its contents are wrong."""
    device, dtype = matrix.device, DTYPES[matrix.dtype]
    cell = new_faults(device)
    dense = torch.empty((matrix.rows, matrix.cols), dtype=dtype, device=device)
    table: Table = {}
    for tokens in TOKEN_CLASSES:
        x = torch.randn((tokens, matrix.cols), device=device).to(dtype)
        out = torch.empty((tokens, matrix.rows), dtype=dtype, device=device)

        def expanded(x: torch.Tensor = x) -> None:
            expand(matrix, dense, faults=cell)
            functional.linear(x, dense)

        times: dict[Plan | None, float] = {None: timer(None, tokens, expanded)}
        for plan in _plans(matrix, tokens):

            def multiplied(x: torch.Tensor = x, out: torch.Tensor = out, plan: Plan = plan) -> None:
                linear(matrix, x, out=out, faults=cell, plan=plan)

            times[plan] = timer(plan, tokens, multiplied)
        table[tokens] = times
    if (fault := int(cell)) != NO_FAULT:
        raise KernelError(fault_text(fault))
    return table


class CudaTimer:
    """Seconds of the GPU, between events; the median of some rounds after one that compiles."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)
        self._event: Callable[..., torch.cuda.Event] = torch.cuda.Event

    def __call__(self, plan: Plan | None, tokens: int, run: Callable[[], object]) -> float:
        """Seconds of one `run`."""
        with torch.cuda.device(self._device):
            run()
            pairs = []
            for _ in range(_ROUNDS):
                self._flushed.zero_()
                begin, end = (self._event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                pairs.append((begin, end))
            torch.cuda.synchronize(self._device)
        return float(median(begin.elapsed_time(end) for begin, end in pairs)) / 1e3
