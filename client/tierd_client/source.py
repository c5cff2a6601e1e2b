"""Where a model comes from: a daemon that serves it, or a private one started for a pack."""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tierd_client.client import Client
from tierd_client.errors import AccessDenied, DaemonNotRunning, ModelNotFound, PackInvalid
from tierd_layouts.errors import FormatError
from tierd_layouts.index import INDEX_FILE, PackIndex

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tierd_client.opened import OpenedModel


@dataclass(frozen=True, slots=True)
class Source:
    """An open model and what ends it (its connection, its private daemon)."""

    opened: OpenedModel
    close: Callable[[], None]


def open_source(name_or_pack: str | os.PathLike[str], socket: str | None) -> Source:
    """The model called `name_or_pack` of the daemon at `socket`, or the pack in that directory.

    A pack directory: the daemon is used if it serves a pack of that name with the same digest,
    else a private daemon is started. Raises ModelNotFound, PackInvalid, DaemonNotRunning,
    PrivateDaemonFailed.
    """
    pack = pack_directory(name_or_pack)
    if pack is None:
        client = Client(socket)
        try:
            return Source(client.open(os.fspath(name_or_pack)), client.close)
        except BaseException:
            client.close()
            raise
    return _open_served(pack, socket) or _open_private(pack)


def pack_directory(name_or_pack: str | os.PathLike[str]) -> Path | None:
    """The directory, when it is a pack's; None for the name of a served model.

    Raises PackInvalid for a path that is no pack: a model name has no separator in it.
    """
    path = Path(name_or_pack)
    text = os.fspath(name_or_pack)
    try:
        if (path / INDEX_FILE).is_file():
            return path.resolve()
    except ValueError:  # characters that no path can have: refused as a name
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return None
        raise
    if path.is_dir() or os.sep in text or isinstance(name_or_pack, os.PathLike):
        raise PackInvalid(f"{text}: no pack there, it has no {INDEX_FILE}", "pack_invalid")
    return None


def _open_served(pack: Path, socket: str | None) -> Source | None:
    try:
        index = PackIndex.parse((pack / INDEX_FILE).read_bytes(), where=str(pack))
    except FormatError as error:
        raise PackInvalid(str(error), "pack_invalid") from error
    try:
        client = Client(socket)
    except DaemonNotRunning:
        return None
    try:
        opened = client.open(pack.name)
    except (ModelNotFound, AccessDenied):
        client.close()
        return None
    except BaseException:
        client.close()
        raise
    if opened.index.digest != index.digest:
        client.close()
        return None
    return Source(opened, client.close)


def _open_private(pack: Path) -> Source:
    from tierd_client import private_daemon

    daemon = private_daemon.start(pack)
    try:
        client = Client(daemon.socket)
        opened = client.open(pack.name)
    except BaseException:
        daemon.stop()
        raise

    def close() -> None:
        client.close()
        daemon.stop()

    return Source(opened, close)


@contextmanager
def control_directory(files: Mapping[str, bytes]) -> Iterator[Path]:
    """A temporary directory that holds the control files: transformers reads only from paths."""
    with tempfile.TemporaryDirectory(prefix="tierd-") as directory:
        for name, text in files.items():
            Path(directory, name).write_bytes(text)
        yield Path(directory)
