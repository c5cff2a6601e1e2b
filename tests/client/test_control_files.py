from __future__ import annotations

import os

from tierd_client.control_files import ControlFiles


def file_of(content: bytes) -> int:
    fd = os.memfd_create("file", os.MFD_CLOEXEC)
    os.pwrite(fd, content, 0)
    return fd


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_file_is_read_when_it_is_asked_for_and_then_closed() -> None:
    first, second = file_of(b"one"), file_of(b"two")
    files = ControlFiles(["a", "b"], [first, second])
    assert sorted(files) == ["a", "b"]
    assert files["a"] == files["a"] == b"one"
    assert (is_open(first), is_open(second)) == (False, True)
    assert len(files) == 2


def test_what_was_not_read_is_closed_in_the_end() -> None:
    fd = file_of(b"one")
    files = ControlFiles(["a"], [fd])
    del files
    assert not is_open(fd)
