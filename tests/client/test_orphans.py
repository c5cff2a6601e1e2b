from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.client.conftest import FakeDaemon
from tierd_client import Client, orphans
from tierd_client.errors import DaemonGone

if TYPE_CHECKING:
    from pathlib import Path

    from tests.client.conftest import TinyPack

GPU = {"kind": "memfd", "number": 0, "uuid": ""}


@pytest.mark.parametrize("tier", ["dram", "gpu:0"])
def test_what_a_dead_daemon_had_leased_in_dram_is_told_and_what_it_had_on_a_gpu_is_not(
    tmp_path: Path, pack: TinyPack, tier: str
) -> None:
    old = FakeDaemon(tmp_path / "a.sock", pack)
    old.device = GPU if tier != "dram" else None
    client = Client(old.path, tier=tier)
    lease = client.lease("tiny", "blocks.0")
    assert orphans.leases(old.path) == []  # it lives
    old.close()
    with pytest.raises(DaemonGone):
        client.ask("status")
    expected = [lease.lease] if tier == "dram" else []
    assert orphans.leases(old.path) == expected
    os.unlink(old.path)
    new = FakeDaemon(tmp_path / "a.sock", pack)
    successor = Client(new.path)
    assert new.asked("hello")[0]["held"] == expected
    lease.release()
    successor.ask("status")
    assert [request["leases"] for request in new.asked("release")] == (
        [expected] if expected else []
    )
    successor.close()
    new.close()
