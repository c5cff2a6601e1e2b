"""What GPU memory that travels as a descriptor really does (cuMemCreate, SCM_RIGHTS)."""

from __future__ import annotations

import os
import select
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.gpu.probes import MARK
from tests.gpu.talk import Probe

if TYPE_CHECKING:
    from tests.gpu.conftest import Record

pytestmark = pytest.mark.gpu
NBYTES = 256 << 20


def client(fd: int, mode: str, use: str, nbytes: int = NBYTES) -> dict[str, Any]:
    """What a process of its own found that mapped the descriptor."""
    with Probe("vmm_client", nbytes, mode, use) as probe:
        probe.say("here it is", [fd])
        found: dict[str, Any] = probe.hear()
        return found


@pytest.mark.parametrize("use", ["kernel", "copy"])
def test_memory_that_is_mapped_for_reading_cannot_be_written(use: str, record: Record) -> None:
    with Probe("vmm_owner", NBYTES) as owner:
        owner.hear()
        found = client(owner.talk.fds[0], "ro", use)
        owner.say("read")
        mark = owner.hear()
    record(f"Is PROT_READ enforced, against a {use}?", found["write"])
    assert found["mark"] == MARK.hex()
    assert found["write"].startswith("refused")
    assert mark == MARK.hex()


def test_a_descriptor_outlives_its_owner_and_memory_goes_back_with_it(record: Record) -> None:
    with Probe("free_memory") as watching:
        before = watching.hear()
        with Probe("vmm_owner", NBYTES) as owner:
            about = owner.hear()
            fd = os.dup(owner.talk.fds[0])
            owner.kill()
        time.sleep(1.0)
        watching.say("again")
        held = before - watching.hear()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        state = poll.poll(0)
        try:
            after = client(fd, "rw", "read")["mark"]
        except RuntimeError as error:
            after = f"cannot be mapped: {error}"
        os.close(fd)
        time.sleep(1.0)
        watching.say("again")
        left = before - watching.hear()
    record("Which granularity do chunks have?", f"{about['granularity']} bytes")
    record("What is the descriptor?", about["link"])
    survives = "the bytes are still there" if after == MARK.hex() else after
    record(
        "Does a descriptor in a process without CUDA keep memory after its owner's SIGKILL?",
        f"{held >> 20} of {NBYTES >> 20} MiB stay; {survives}",
    )
    record("What does poll() say of it (the descriptor store)?", state)
    record("What stays when the last descriptor is closed?", f"{left >> 20} MiB")
    assert left < NBYTES // 2, "a daemon that dies must not cost memory for good"


@pytest.mark.parametrize("mib", [2, 32, 64])
def test_what_a_chunk_costs(mib: int, record: Record) -> None:
    with Probe("vmm_owner", mib << 20) as owner:
        about = owner.hear()
        found = client(owner.talk.fds[0], "ro", "read", mib << 20)
    record(
        f"What does a chunk of {mib} MiB cost?",
        f"create {about['created_ms']} ms, export {about['exported_ms']} ms, "
        f"import {found['imported_ms']} ms, map {found['mapped_ms']} ms",
    )
    assert found["mark"] == MARK.hex()


def test_torch_sees_a_mapped_chunk_without_a_copy(record: Record) -> None:
    with Probe("vmm_owner", NBYTES) as owner:
        owner.hear()
        found = client(owner.talk.fds[0], "ro", "torch")
    record(
        "Does torch view a descriptor's memory without a copy?",
        f"{found['zero_copy']}, in {found['made_ms']} ms",
    )
    assert found["zero_copy"]
    assert found["sum"] == sum(MARK)
