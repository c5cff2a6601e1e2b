from __future__ import annotations

import queue
import random
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.daemon.gpu.conftest import BUDGET, CHUNK, Rig, make_rig
from tierd.gpu.copy_engine import address_of
from tierd.gpu.errors import DeviceError, DeviceLost
from tierd.gpu.registrar import Registrar
from tierd.gpu.registration import HostMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 1 << 20
SPAN = 8 * BLOCK
PATIENCE_S = 20.0


class Rigged:
    """A registrar over one arena of 8 blocks, and a GPU whose registrations are looked at."""

    def __init__(self, quiet_s: float = 0.0, patience_s: float = PATIENCE_S) -> None:
        self.memory = memoryview(bytearray(SPAN + 4096))
        self.address = -(-address_of(self.memory) // 4096) * 4096
        self.calls: queue.Queue[tuple[Callable[..., object], tuple[object, ...]]] = queue.Queue()
        self.host = HostMemory(BLOCK)
        self.rig: Rig = make_rig("cuda_vmm", host=self.host)
        self.rig.device.open()
        self.registrar = Registrar(
            self.host, lambda call, *values: self.calls.put((call, values)),
            quiet_s=quiet_s, patience_s=patience_s,
        )  # fmt: skip
        self.registrar.add_arena(0, self.address, SPAN)

    @property
    def registered(self) -> dict[int, int]:
        """Offset -> size, as the driver has them."""
        with self.rig.driver.lock:
            return {at - self.address: size for at, size in self.rig.driver.registered.items()}

    def wait_registered(self, wanted: dict[int, int]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.registered != wanted:
            assert time.monotonic() < deadline, (self.registered, wanted)
            time.sleep(0.005)

    def discard(self, start: int, end: int) -> DeviceError | None:
        answers: list[DeviceError | None] = []
        self.registrar.discard(0, start, end, answers.append)
        call, values = self.calls.get(timeout=PATIENCE_S)
        call(*values)
        return answers[0]

    def view(self, offset: int, nbytes: int) -> memoryview:
        start = self.address - address_of(self.memory) + offset
        return self.memory[start : start + nbytes]


@pytest.fixture
def rigged() -> Iterator[Rigged]:
    rigged = Rigged()
    rigged.registrar.add_device(rigged.rig.device)
    yield rigged
    rigged.registrar.close()
    assert rigged.registered == {}
    rigged.rig.device.close()


def test_what_exists_is_registered_block_by_block_and_nothing_else(rigged: Rigged) -> None:
    rigged.registrar.populated(0, 0, 2 * BLOCK + 8192)
    rigged.wait_registered({0: BLOCK, BLOCK: BLOCK, 2 * BLOCK: 8192})
    assert rigged.host.registered_bytes == rigged.host.existing_bytes == 2 * BLOCK + 8192


def test_memory_that_existed_before_the_gpu_was_open_is_registered_then() -> None:
    rigged = Rigged()
    rigged.registrar.populated(0, 0, BLOCK)
    assert rigged.registered == {}
    rigged.registrar.add_device(rigged.rig.device)
    rigged.wait_registered({0: BLOCK})
    rigged.registrar.close()
    rigged.rig.device.close()


def test_of_a_block_that_grew_what_is_new_is_registered(rigged: Rigged) -> None:
    rigged.registrar.populated(0, 0, 8192)
    rigged.wait_registered({0: 8192})
    rigged.registrar.populated(0, 8192, 16384)
    rigged.wait_registered({0: 8192, 8192: 8192})


def test_many_small_registrations_become_one(rigged: Rigged) -> None:
    for at in range(0, 9 * 4096, 4096):
        rigged.registrar.populated(0, at, at + 4096)
        rigged.wait_registered({start: 4096 for start in range(0, at + 4096, 4096)})
    rigged.registrar.populated(0, 9 * 4096, 10 * 4096)
    rigged.wait_registered({start: 4096 for start in range(0, 10 * 4096, 4096)})
    rigged.registrar.populated(0, 10 * 4096, 11 * 4096)
    rigged.wait_registered({0: 11 * 4096})


def test_a_block_that_grows_is_left_alone_until_it_is_full() -> None:
    rigged = Rigged(quiet_s=3600)
    rigged.registrar.add_device(rigged.rig.device)
    for start in range(0, 2 * BLOCK - 4096, 4096):
        rigged.registrar.populated(0, start, start + 4096)
    rigged.wait_registered({0: BLOCK})
    assert rigged.rig.driver.calls.count("cuMemHostRegister") == 1
    rigged.registrar.close()
    rigged.rig.device.close()


def test_before_a_discard_nothing_of_it_is_registered_and_the_rest_is_again_afterwards(
    rigged: Rigged,
) -> None:
    rigged.registrar.populated(0, 0, 3 * BLOCK)
    rigged.wait_registered({0: BLOCK, BLOCK: BLOCK, 2 * BLOCK: BLOCK})
    assert rigged.discard(BLOCK + 4096, 2 * BLOCK + 4096) is None
    assert rigged.registered.get(0) == BLOCK
    rigged.wait_registered({0: BLOCK, BLOCK: 4096, 2 * BLOCK + 4096: BLOCK - 4096})


def test_a_discard_waits_for_the_copies_from_that_registration_and_for_no_others(
    rigged: Rigged,
) -> None:
    rigged.registrar.populated(0, 0, 2 * BLOCK)
    rigged.wait_registered({0: BLOCK, BLOCK: BLOCK})
    use = rigged.host.use(rigged.address, 100)
    assert rigged.discard(BLOCK, 2 * BLOCK) is None
    answers: list[DeviceError | None] = []
    rigged.registrar.discard(0, 4096, 8192, answers.append)
    with pytest.raises(queue.Empty):
        rigged.calls.get(timeout=0.05)
    assert rigged.registered == {0: BLOCK}
    use.end()
    call, values = rigged.calls.get(timeout=PATIENCE_S)
    call(*values)
    assert answers == [None]


def test_without_a_gpu_a_discard_is_answered_at_once() -> None:
    rigged = Rigged()
    rigged.registrar.populated(0, 0, BLOCK)
    assert rigged.discard(0, BLOCK) is None
    assert rigged.host.existing_bytes == 0
    rigged.registrar.close()
    rigged.rig.device.close()


def test_memory_that_cannot_be_registered_is_named_and_not_tried_for_ever(rigged: Rigged) -> None:
    code = rigged.rig.driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    rigged.rig.driver.faults["cuMemHostRegister"] = code
    rigged.registrar.populated(0, 0, BLOCK)
    deadline = time.monotonic() + PATIENCE_S
    while not (notes := rigged.registrar.notes()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert "of 1" in notes[0]
    assert "cuMemHostRegister (1048576 bytes at" in notes[0]
    assert "CUDA_ERROR_OUT_OF_MEMORY (2)" in notes[0]
    tried = rigged.rig.driver.calls.count("cuMemHostRegister")
    rigged.registrar.populated(0, BLOCK, 2 * BLOCK)
    assert rigged.discard(4 * BLOCK, 5 * BLOCK) is None
    assert rigged.rig.driver.calls.count("cuMemHostRegister") <= tried + 1
    rigged.rig.driver.faults.clear()
    assert rigged.registrar.alive()


def test_memory_that_stays_registered_must_not_be_given_back(rigged: Rigged) -> None:
    rigged.registrar.populated(0, 0, BLOCK)
    rigged.wait_registered({0: BLOCK})
    rigged.rig.driver.faults["cuMemHostUnregister"] = rigged.rig.driver.CUresult.CUDA_ERROR_UNKNOWN
    failure = rigged.discard(0, BLOCK)
    assert isinstance(failure, DeviceError)
    assert "cuMemHostUnregister" in str(failure)
    assert rigged.host.existing_bytes == BLOCK
    rigged.rig.driver.faults.clear()


def test_what_a_broken_gpu_still_has_registered_holds_up_nobody() -> None:
    rigged = Rigged()
    rigged.registrar.add_device(rigged.rig.device)
    rigged.registrar.populated(0, 0, BLOCK)
    rigged.wait_registered({0: BLOCK})
    rigged.rig.driver.lost = rigged.rig.driver.CUresult.CUDA_ERROR_ECC_UNCORRECTABLE
    with pytest.raises(DeviceLost):
        rigged.rig.device.memory()
    assert rigged.discard(0, BLOCK) is None
    assert rigged.host.registered_bytes == 0
    rigged.registrar.close()
    rigged.rig.device.close()


def test_another_gpu_takes_over_when_one_is_broken(rigged: Rigged) -> None:
    broken = make_rig("cuda_vmm")
    broken.device.open()
    broken.driver.lost = broken.driver.CUresult.CUDA_ERROR_ECC_UNCORRECTABLE
    rigged.registrar.close()
    registrar = Registrar(rigged.host, lambda call, *values: rigged.calls.put((call, values)))
    registrar.add_device(broken.device)
    registrar.add_device(rigged.rig.device)
    registrar.populated(0, 0, BLOCK)
    rigged.wait_registered({0: BLOCK})
    registrar.close()


def test_close_says_that_the_driver_does_not_answer(rigged: Rigged) -> None:
    rigged.registrar.populated(0, 0, BLOCK)
    rigged.wait_registered({0: BLOCK})
    answers = threading.Event()
    unregister = rigged.rig.device.unregister

    def hang(address: int, nbytes: int) -> None:
        assert answers.wait(PATIENCE_S)
        unregister(address, nbytes)

    rigged.rig.device.unregister = hang  # type: ignore[method-assign]
    with pytest.raises(TimeoutError, match="tierd-pinning did not end"):
        rigged.registrar.close(timeout_s=0.05)
    answers.set()


def test_a_copy_that_hangs_holds_up_its_own_memory_and_no_other() -> None:
    rigged = Rigged(patience_s=0.05)
    rigged.registrar.add_device(rigged.rig.device)
    rigged.registrar.populated(0, 0, 2 * BLOCK)
    rigged.wait_registered({0: BLOCK, BLOCK: BLOCK})
    use = rigged.host.use(rigged.address, 100)
    hung: list[DeviceError | None] = []
    rigged.registrar.discard(0, 0, 4096, hung.append)
    assert rigged.discard(BLOCK, 2 * BLOCK) is None
    assert rigged.registered == {0: BLOCK}
    rigged.host.use(rigged.address, 100).end()  # other GPUs copy from it
    rigged.registrar.populated(0, 2 * BLOCK, 3 * BLOCK)
    rigged.wait_registered({0: BLOCK, 2 * BLOCK: BLOCK})
    assert hung == []
    use.end()
    call, values = rigged.calls.get(timeout=PATIENCE_S)
    call(*values)
    assert hung == [None]
    rigged.registrar.close()
    rigged.rig.device.close()


def test_memory_of_which_nothing_is_registered_is_discarded_whoever_copies_beside_it() -> None:
    rigged = Rigged(quiet_s=3600)
    rigged.registrar.add_device(rigged.rig.device)
    rigged.registrar.populated(0, 0, BLOCK - 4096)
    use = rigged.host.use(rigged.address, 100)
    assert rigged.discard(8192, 16384) is None
    assert rigged.host.existing_bytes == BLOCK - 4096 - 8192
    use.end()
    rigged.registrar.close()
    rigged.rig.device.close()


def test_what_was_not_registered_because_of_a_copy_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tierd.gpu.registrar.PUT_OFF_S", 0.05)
    monkeypatch.setattr("tierd.gpu.registrar.RETRY_S", 0.01)
    rigged = Rigged(patience_s=0.01)
    rigged.registrar.populated(0, 0, BLOCK)
    use = rigged.host.use(rigged.address, 100)
    rigged.registrar.add_device(rigged.rig.device)
    rigged.registrar.populated(0, BLOCK, 2 * BLOCK)
    rigged.wait_registered({BLOCK: BLOCK})
    use.end()
    rigged.wait_registered({0: BLOCK, BLOCK: BLOCK})
    rigged.registrar.close()
    rigged.rig.device.close()


def test_closing_takes_no_longer_than_it_may_however_much_is_registered() -> None:
    rigged = Rigged()
    rigged.registrar.add_device(rigged.rig.device)
    rigged.registrar.populated(0, 0, SPAN)
    rigged.wait_registered({at * BLOCK: BLOCK for at in range(8)})
    unregister = rigged.rig.device.unregister

    def slowly(address: int, nbytes: int) -> None:
        time.sleep(0.1)
        unregister(address, nbytes)

    rigged.rig.device.unregister = slowly  # type: ignore[method-assign]
    rigged.registrar.close(timeout_s=0.5)
    assert 1 <= len(rigged.registered) < 8


def test_where_dram_is_full_and_streams_copies_stay_pinned() -> None:
    """A discard every few milliseconds, at any place, and what was discarded is read again."""
    rigged = Rigged(quiet_s=3600)
    rigged.registrar.add_device(rigged.rig.device)
    device = rigged.rig.device
    device.add_arena(0, BUDGET)
    device.back(0, 0, 1)
    rigged.registrar.populated(0, 0, SPAN)
    rigged.wait_registered({at * BLOCK: BLOCK for at in range(8)})
    rng = random.Random(1)
    copied = 0
    for _ in range(60):
        start = rng.randrange(0, SPAN - 65536, 4096)
        assert rigged.discard(start, start + 65536) is None
        rigged.registrar.populated(0, start, start + 65536)
        time.sleep(0.01)
        for _ in range(3):
            offset = rng.randrange(SPAN - 300_000)
            device.copy(0, 0, rigged.view(offset, 300_000)).wait()
            copied += 300_000
    assert device.unpinned_bytes < copied // 5
    rigged.registrar.close()
    device.close()


@pytest.mark.parametrize("seed", range(6))
def test_copies_that_go_on_meanwhile_are_whole(seed: int) -> None:
    """The fake driver refuses a copy over the end of a registration, and breaks its context when
    memory is unregistered under a copy."""
    rng = random.Random(seed)
    rigged = Rigged()
    rigged.registrar.add_device(rigged.rig.device)
    device = rigged.rig.device
    device.add_arena(0, BUDGET)
    device.back(0, 0, BUDGET // CHUNK)
    content = np.frombuffer(rng.randbytes(SPAN), dtype=np.uint8)
    np.frombuffer(rigged.view(0, SPAN), dtype=np.uint8)[:] = content
    stop = threading.Event()
    failures: list[BaseException] = []

    def copy(seed: int, target: int) -> None:
        rng = random.Random(seed)
        try:
            while not stop.is_set():
                offset = rng.randrange(SPAN - 1)
                nbytes = rng.randint(1, min(CHUNK, SPAN - offset))
                device.copy(0, target, rigged.view(offset, nbytes)).wait()
                found = rigged.rig.content(0, target // CHUNK)[:nbytes]
                assert found == content[offset : offset + nbytes].tobytes()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=copy, args=(seed * 10 + at, at * CHUNK)) for at in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        start = rng.randrange(0, SPAN, 4096)
        end = rng.randrange(start, SPAN, 4096) + 4096
        if rng.random() < 0.6:
            rigged.registrar.populated(0, start, end)
        else:
            assert rigged.discard(start, end) is None
            for at, size in rigged.registered.items():
                assert at + size <= start or end <= at
    stop.set()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert failures == []
    rigged.registrar.close()
    device.close()
    assert rigged.rig.driver.live() == {}
