"""What the doctor says about the directories of packs."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tierd_tools import random_pack
from tierd_tools.doctor import storage

if TYPE_CHECKING:
    import pytest


def test_a_pack_and_a_directory_of_packs_are_read_directly(tmp_path: Path) -> None:
    random_pack.write(tmp_path / "one", 1, 8192)
    verdicts = {storage.direct_reads(path).verdict for path in (tmp_path, tmp_path / "one")}
    assert verdicts <= {"works", "does not work"}  # as the file system below tmp has it
    assert len(verdicts) == 1


def test_a_directory_without_packs_is_unknown(tmp_path: Path) -> None:
    found = storage.direct_reads(tmp_path)
    assert (found.verdict, found.needed) == ("unknown", False)


def test_a_directory_that_is_not_there_is_needed() -> None:
    assert storage.direct_reads(Path("/no/such/directory")).failed


def test_a_file_system_that_refuses_costs_cpu_but_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_pack.write(tmp_path / "one", 1, 8192)
    really = os.open

    def refusing(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    found = storage.direct_reads(tmp_path)
    assert found.verdict == "does not work"
    assert not found.failed
    assert "refuses O_DIRECT" in found.text


def test_a_pack_that_may_not_be_read_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_pack.write(tmp_path / "one", 1, 8192)

    def refused(shard: Path) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(storage, "_read_directly", refused)
    found = storage.direct_reads(tmp_path)
    assert found.failed
    assert "Permission denied" in found.text
