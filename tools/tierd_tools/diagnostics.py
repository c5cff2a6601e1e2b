"""One question to a daemon, one answer: the diagnostics need no handshake."""

from __future__ import annotations

import socket
from typing import Any

from tierd_layouts import wire
from tierd_tools.errors import DaemonRefused, NoDaemon

TIMEOUT_SECONDS = 60.0


def ask(socket_path: str | None, op: str, **fields: Any) -> wire.Message:
    """The reply's fields. Raises NoDaemon, and DaemonRefused with the daemon's own text."""
    path = wire.resolve_socket(socket_path, for_listening=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(TIMEOUT_SECONDS)
        try:
            sock.connect(path)
            sock.sendall(wire.encode({"id": 1, "op": op, **fields}, wire.MAX_REQUEST_BYTES))
            reply = _receive(sock)
        except TimeoutError as error:
            raise NoDaemon(f"no answer at {path} within {TIMEOUT_SECONDS:g} s") from error
        except OSError as error:
            raise NoDaemon(f"no daemon answers at {path}: {error.strerror or error}") from error
    if not reply["ok"]:
        raise DaemonRefused(f"{reply['error']['text']} ({reply['error']['code']})")
    return {key: value for key, value in reply.items() if key not in ("id", "ok")}


def _receive(sock: socket.socket) -> wire.Message:
    decoder = wire.FrameDecoder(wire.MAX_REPLY_BYTES)
    while True:
        data = sock.recv(1 << 16)
        if not data:
            raise ConnectionResetError("the connection closed before the reply was complete")
        decoder.feed(data)
        for message in decoder:
            return message
