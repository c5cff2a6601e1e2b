"""One question to a daemon, one answer: the diagnostics need no handshake."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tierd_client.connection import Connection
from tierd_client.errors import Refused, TierdError
from tierd_layouts import wire
from tierd_tools.errors import DaemonRefused, NoDaemon

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TIMEOUT_SECONDS = 60.0


def ask(socket_path: str | None, op: str, **fields: Any) -> wire.Message:
    """The reply's fields. Raises NoDaemon, and DaemonRefused with the daemon's own text."""
    with asking(socket_path) as one:
        return one(op, **fields)


@contextmanager
def asking(socket_path: str | None) -> Iterator[Callable[..., wire.Message]]:
    """`ask` over one connection, for several questions."""
    path = wire.resolve_socket(socket_path, for_listening=False)
    try:
        connection = Connection.connect(path, TIMEOUT_SECONDS)
    except TierdError as error:
        raise NoDaemon(str(error)) from error

    def one(op: str, **fields: Any) -> wire.Message:
        try:
            reply = connection.call(op, **fields)
        except Refused as error:
            raise DaemonRefused(f"{error} ({error.code})") from error
        except TierdError as error:
            raise NoDaemon(str(error)) from error
        return {key: value for key, value in reply.fields.items() if key not in ("id", "ok")}

    try:
        yield one
    finally:
        connection.close()
