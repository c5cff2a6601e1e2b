"""One question to a daemon, one answer: the diagnostics need no handshake."""

from __future__ import annotations

from typing import Any

from tierd_client.connection import Connection
from tierd_client.errors import Refused, TierdError
from tierd_layouts import wire
from tierd_tools.errors import DaemonRefused, NoDaemon

TIMEOUT_SECONDS = 60.0


def ask(socket_path: str | None, op: str, **fields: Any) -> wire.Message:
    """The reply's fields. Raises NoDaemon, and DaemonRefused with the daemon's own text."""
    path = wire.resolve_socket(socket_path, for_listening=False)
    try:
        connection = Connection.connect(path, TIMEOUT_SECONDS)
        try:
            reply = connection.call(op, **fields)
        finally:
            connection.close()
    except Refused as error:
        raise DaemonRefused(f"{error} ({error.code})") from error
    except TierdError as error:
        raise NoDaemon(str(error)) from error
    return {key: value for key, value in reply.fields.items() if key not in ("id", "ok")}
