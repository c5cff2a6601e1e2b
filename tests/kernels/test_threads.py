"""Threads change the time, never the result, and survive fork and company."""

import ctypes
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import tierd_kernels
from tierd_kernels import KernelError, PackedMatrix, expand, linear
from tierd_layouts.packed_matrix import encode_raw


@pytest.fixture
def default_after() -> Iterator[None]:
    yield
    tierd_kernels.set_threads(0)


@pytest.fixture
def switch_never() -> Iterator[None]:
    """A thread keeps the GIL until it gives it away."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    yield
    sys.setswitchinterval(before)


def work(packed: PackedMatrix, matrix: Any, threads: int) -> bool:
    out = np.empty_like(matrix)
    expand(packed, out, threads=threads)
    return np.array_equal(out, matrix)


def test_more_threads_than_tile_rows_or_processors_is_only_slower(
    native_kernel: str, random_bits: Callable[..., Any]
) -> None:
    matrix = random_bits(1, 200, 300, "BF16", 0.5)
    packed = encode_raw(matrix, "BF16")
    for threads in (1, 2, 3, 16, 128):
        assert work(packed, matrix, threads)


def test_several_python_threads_may_call_at_once(
    native_kernel: str, random_weights: Callable[..., Any], random_x: Callable[..., Any]
) -> None:
    matrix = random_weights(2, 256, 512, "BF16")
    packed = encode_raw(matrix, "BF16")
    xs = [random_x(seed, 3, 512, "BF16") for seed in range(4)]

    def product(x: Any) -> Any:
        out = np.empty((3, 256), np.float32)
        linear(packed, x, out, threads=2)
        return out

    expected = [product(x) for x in xs]
    failed: list[int] = []

    def repeat(caller: int) -> None:
        if not all(np.array_equal(product(xs[caller]), expected[caller]) for _ in range(100)):
            failed.append(caller)

    callers = [threading.Thread(target=repeat, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert failed == []


def test_the_gil_is_released(
    native_kernel: str, random_bits: Callable[..., Any], switch_never: None
) -> None:
    """Another thread runs Python during a call; without a release it would wait for the end."""
    matrix = random_bits(3, 4096, 4096, "BF16", 0.5)
    packed = encode_raw(matrix, "BF16")
    out = np.empty_like(matrix)
    steps = 0
    during = -1
    inside = threading.Event()

    def expander() -> None:
        nonlocal during
        inside.set()
        for _ in range(100):  # on a busy machine the other thread may not come to run during one
            before = steps
            expand(packed, out, threads=1)
            during = steps - before
            if during:
                break

    thread = threading.Thread(target=expander)
    thread.start()
    inside.wait()
    while thread.is_alive():
        steps += 1
        time.sleep(0)
    assert during > 0


def test_a_forked_child_makes_its_own_threads(
    native_kernel: str, random_bits: Callable[..., Any]
) -> None:
    matrix = random_bits(4, 300, 300, "BF16", 0.5)
    packed = encode_raw(matrix, "BF16")
    assert work(packed, matrix, 2)
    with warnings.catch_warnings():
        # Python 3.12 warns about every fork beside threads; that it works is what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        right = all(work(packed, matrix, 3) for _ in range(20))
        os._exit(len(os.listdir("/proc/self/task")) if right else 0)
    own_threads = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert own_threads == 3
    assert work(packed, matrix, 2)


def test_a_fork_in_the_middle_of_another_threads_work_is_harmless(
    native_kernel: str, random_bits: Callable[..., Any]
) -> None:
    matrix = random_bits(5, 1024, 1024, "BF16", 0.5)
    packed = encode_raw(matrix, "BF16")
    stop = threading.Event()

    def busy() -> None:
        out = np.empty_like(matrix)
        while not stop.is_set():
            expand(packed, out, threads=2)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        for _ in range(5):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                signal.alarm(20)
                os._exit(0 if work(packed, matrix, 2) else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        thread.join()


@pytest.mark.usefixtures("default_after")
def test_the_default_can_be_set_and_reset() -> None:
    tierd_kernels.set_threads(1)
    assert tierd_kernels.get_threads() == 1
    tierd_kernels.set_threads(0)
    assert tierd_kernels.get_threads() >= 1


@pytest.mark.parametrize("threads", [-1, 129])
def test_a_wrong_number_of_threads_is_refused(threads: int) -> None:
    with pytest.raises(KernelError, match=f"threads {threads} is not in 0..128"):
        tierd_kernels.set_threads(threads)
    empty = np.zeros((0, 0), np.uint16)
    with pytest.raises(KernelError, match=f"threads {threads}"):
        expand(encode_raw(empty, "BF16"), empty, threads=threads)


class Runtime:
    """An OpenMP runtime as the kernels see it: GOMP_parallel on Python threads."""

    def __init__(self) -> None:
        self.teams: list[int] = []
        self.bodies = 0
        body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

        def parallel(address: int, context: int, threads: int, flags: int) -> None:
            def run() -> None:
                self.bodies += 1
                body(address)(context)

            self.teams.append(threads)
            others = [threading.Thread(target=run) for _ in range(threads - 1)]
            for other in others:
                other.start()
            run()
            for other in others:
                other.join()

        signature = ctypes.CFUNCTYPE(
            None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        )
        self._parallel = signature(parallel)
        address = ctypes.cast(self._parallel, ctypes.c_void_p).value
        assert address is not None
        self.address = address


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    yield Runtime()
    tierd_kernels.share_threads(0, 1)


def test_loops_run_on_the_team_of_a_runtime_until_told_otherwise(
    native_kernel: str, random_bits: Callable[..., Any], runtime: Runtime
) -> None:
    matrix = random_bits(5, 300, 300, "BF16", 0.5)
    packed = encode_raw(matrix, "BF16")
    tierd_kernels.share_threads(runtime.address, 1)
    assert work(packed, matrix, 3)
    assert runtime.teams == [3]
    assert work(packed, matrix, 1)
    assert runtime.teams == [3], "one thread needs no team"
    tierd_kernels.share_threads(0, 1)
    assert work(packed, matrix, 3)
    assert runtime.teams == [3]


def test_a_call_leaves_the_team_as_large_as_it_is_and_takes_its_threads_of_it(
    native_kernel: str, random_bits: Callable[..., Any], runtime: Runtime
) -> None:
    matrix = random_bits(6, 1000, 300, "BF16", 0.5)
    packed = encode_raw(matrix, "BF16")
    tierd_kernels.share_threads(runtime.address, 4)
    assert work(packed, matrix, 2)
    assert runtime.teams == [4]
    assert runtime.bodies == 4


def test_a_second_caller_does_its_job_alone(
    native_kernel: str, random_bits: Callable[..., Any], runtime: Runtime
) -> None:
    matrix = random_bits(7, 300, 300, "BF16", 0.5)
    packed = encode_raw(matrix, "BF16")
    inside: list[bool] = []
    run = threading.Thread.run

    def run_and_call(thread: threading.Thread) -> None:
        inside.append(work(packed, matrix, 2))  # while the first caller has the team
        run(thread)

    tierd_kernels.share_threads(runtime.address, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "run", run_and_call)
        assert work(packed, matrix, 2)
    assert inside == [True]
    assert runtime.teams == [2]


def test_a_forked_child_does_not_wait_for_the_runtimes_threads(
    native_kernel: str, random_bits: Callable[..., Any], runtime: Runtime
) -> None:
    matrix = random_bits(8, 300, 300, "BF16", 0.5)
    packed = encode_raw(matrix, "BF16")
    tierd_kernels.share_threads(runtime.address, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        right = work(packed, matrix, 3)
        os._exit(0 if right and not runtime.teams else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert work(packed, matrix, 2)
    assert runtime.teams == [2]


def test_a_team_of_more_threads_than_kernels_know_is_refused() -> None:
    with pytest.raises(KernelError, match=r"threads 129 is not in 0\.\.128"):
        tierd_kernels.share_threads(0, 129)
