"""What CUDA IPC really does: memory handles and events between processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gpu.probes import MARK, OTHER
from tests.gpu.talk import Probe

if TYPE_CHECKING:
    from tests.gpu.conftest import Record

pytestmark = pytest.mark.gpu
NBYTES = 256 << 20
SPIN_CYCLES = 400_000_000


def test_memory_handles_between_processes(record: Record) -> None:
    with Probe("ipc_owner", NBYTES) as owner:
        about = owner.hear()
        with Probe("ipc_client", about["handle"]) as client:
            found = client.hear()
            owner.say("read")
            seen = owner.hear()
            owner.kill()
            client.say("the owner is dead")
            after = client.hear()
    record("Is runtime memory aligned to 2 MiB?", about["aligned"])
    record("Does a handle open in its own process?", about["same_process"])
    record("Is the handle of an inner address that of the block?", about["inside_is_the_same"])
    record(
        "What does opening cost?",
        f"handle {about['handle_ms']} ms, open {found['first_ms']} ms, again "
        f"{found['second_ms']} ms, same address {found['same_address']}",
    )
    record("Does the owner see what an importer writes?", seen == OTHER.hex())
    record("What does an importer read after the owner's SIGKILL?", after)
    record("Does torch view it without a copy?", f"{found['zero_copy']}, {found['made_ms']} ms")
    assert found["mark"] == MARK.hex()
    assert found["zero_copy"]


def test_an_event_of_another_process_is_waited_for(record: Record) -> None:
    with Probe("event_owner", SPIN_CYCLES) as owner:
        handle = owner.hear()
        with Probe("event_client", handle) as client:
            assert client.hear() == "open"
            owner.say("go")
            assert owner.hear() == "recorded"
            client.say("wait")
            waited, spun = client.hear(), owner.hear()
    record("Does a stream wait for another process's event?", f"{waited} ms of {spun} ms")
    assert waited > spun / 4
