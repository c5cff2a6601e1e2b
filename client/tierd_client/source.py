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
from tierd_client.device import place
from tierd_client.errors import (
    AccessDenied,
    DaemonNotRunning,
    ModelNotFound,
    PackInvalid,
    TierUnavailable,
)
from tierd_layouts.errors import FormatError
from tierd_layouts.index import INDEX_FILE, PackIndex
from tierd_layouts.wire import DRAM_TIER, ErrorCode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tierd_client.opened import OpenedModel


@dataclass(frozen=True, slots=True)
class Source:
    """An open model and what ends it (its connection, its private daemon)."""

    opened: OpenedModel
    close: Callable[[], None]


def open_source(
    name_or_pack: str | os.PathLike[str],
    socket: str | None,
    tier: str = DRAM_TIER,
    device: str | None = None,
) -> Source:
    """The model called `name_or_pack` of the daemon at `socket`, or the pack in that directory.

    A pack directory: the daemon is used if it serves a pack of that name with the same digest,
    else a private daemon is started; one that `socket` names must run. tier: what its leases are
    of; device: where it will compute, None for wherever that is. Raises ModelNotFound, PackInvalid,
    DaemonNotRunning, PrivateDaemonFailed, TierUnavailable, UnsupportedDevice.
    """
    pack = pack_directory(name_or_pack)
    if pack is None:
        client = Client(socket, tier=tier)
        try:
            _check_place(client, device)
            return Source(client.open(os.fspath(name_or_pack)), client.close)
        except BaseException:
            client.close()
            raise
    served = _open_served(pack, socket, tier, device)
    if served is None and tier != DRAM_TIER:
        raise TierUnavailable(
            f"{pack} is served by no daemon on tier {tier!r}, and a private one has DRAM only: "
            "start tierd with --gpu",
            ErrorCode.TIER_UNAVAILABLE,
        )
    return served or _open_private(pack)


def _check_place(client: Client, device: str | None) -> None:
    if device is not None and client.gpu is not None:
        place(client.gpu, client.tier, device)


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


def _open_served(pack: Path, socket: str | None, tier: str, device: str | None) -> Source | None:
    try:
        index = PackIndex.parse((pack / INDEX_FILE).read_bytes(), where=str(pack))
    except FormatError as error:
        raise PackInvalid(str(error), "pack_invalid") from error
    try:
        client = Client(socket, tier=tier)
    except DaemonNotRunning:
        if socket is not None:
            raise
        return None
    try:
        _check_place(client, device)
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
