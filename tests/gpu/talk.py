"""Processes that ask a GPU one question each: an error of CUDA ends the context it happens in.

python -m tests.gpu.probes NAME FD [ARGUMENT ...] runs the probe of that name, which speaks JSON
over the socket FD with whoever started it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parents[2]
ANSWER_S = 60.0
_LARGEST = 1 << 16


class Talk:
    """One end of a conversation: messages with descriptors."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.settimeout(ANSWER_S)
        self.fds: list[int] = []  #: that came and were not taken

    def say(self, message: Any, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self._socket, [json.dumps(message).encode()], list(fds))

    def hear(self) -> Any:
        """The next message. Raises EOFError when the other process is gone."""
        data, fds, _, _ = socket.recv_fds(self._socket, _LARGEST, 16)
        self.fds += fds
        if not data:
            raise EOFError("the other process is gone")
        return json.loads(data)

    def close(self) -> None:
        self._socket.close()
        for fd in self.fds:
            os.close(fd)


class Probe:
    """A probe's process, as the test sees it. What goes wrong in it is raised by `hear`."""

    def __init__(self, name: str, *arguments: object) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.talk = Talk(ours)
        command = [sys.executable, "-m", "tests.gpu.probes", name, str(theirs.fileno())]
        self._process = subprocess.Popen(
            [*command, *map(str, arguments)], pass_fds=[theirs.fileno()], cwd=ROOT
        )
        theirs.close()

    def say(self, message: Any, fds: Sequence[int] = ()) -> None:
        self.talk.say(message, fds)

    def hear(self) -> Any:
        """Raises RuntimeError with the text of the probe's exception."""
        message = self.talk.hear()
        if isinstance(message, dict) and "exception" in message:
            raise RuntimeError(message["exception"])
        return message

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.talk.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()
