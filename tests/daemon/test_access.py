from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tierd.access import AccessGroup
from tierd.io.process import PeerCredentials

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("group", "admitted"),
    [
        (AccessGroup(7, 8, 0o444), True),
        (AccessGroup(7, 8, 0o440), False),
        (AccessGroup(7, 100, 0o440), True),
        (AccessGroup(7, 300, 0o440), True),
        (AccessGroup(7, 100, 0o404), False),  # the group decides, not the others
        (AccessGroup(50, 8, 0o400), True),
        (AccessGroup(50, 8, 0o044), False),  # the owner decides, not the others
    ],
)
def test_a_peer_is_admitted_where_it_could_read_the_file(
    group: AccessGroup, admitted: bool
) -> None:
    assert group.admits(PeerCredentials(pid=1, uid=50, gid=100, groups=(200, 300))) is admitted


def test_only_read_bits_make_a_group(tmp_path: Path) -> None:
    file = tmp_path / "tierd.json"
    file.write_text("")
    groups = set()
    for mode in (0o644, 0o666, 0o755):
        file.chmod(mode)
        groups.add(AccessGroup.of(os.stat(file)))
    assert groups == {AccessGroup(os.getuid(), os.getgid(), 0o444)}


def test_a_group_survives_as_text() -> None:
    group = AccessGroup(1000, 65534, 0o440)
    assert AccessGroup.parse(str(group)) == group
    assert AccessGroup.parse("u1-g2") is None
    assert AccessGroup.parse("u1-g2-m9999") is None
