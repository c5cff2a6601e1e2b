"""What an `open` reply shares with this process: control files, an arena, the slot table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tierd_client.control_files import ControlFiles
from tierd_client.errors import PackInvalid, ProtocolBroken
from tierd_client.inbox import close_all
from tierd_client.mapping import TableMapping, mappings
from tierd_layouts.errors import FormatError
from tierd_layouts.index import INDEX_FILE, PackIndex
from tierd_layouts.wire import DRAM_TIER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tierd_client.connection import Connection
    from tierd_client.gpu.arenas import GpuArenas
    from tierd_client.memory import ArenaMemory
    from tierd_client.protocol import Reply


@dataclass(frozen=True, slots=True)
class Shared:
    """populate: has a leased range of the arena, offset and bytes, readable in `memory`."""

    model_id: int
    files: Mapping[str, bytes]
    index: PackIndex
    table: TableMapping
    arena: int
    memory: ArenaMemory
    populate: Callable[[int, int], None]


def receive(
    name: str, connection: Connection, epoch: int, reply: Reply, arenas: GpuArenas | None
) -> Shared:
    """Map what the reply to the open of model `name` brought.

    arenas: those of the connection's tier; None for DRAM. Raises PackInvalid, DeviceFailed,
    OSError; ProtocolBroken, which ends the connection.
    """
    fields, arena = reply.fields, reply.fields.get("arena")
    kind = arena.get("kind", DRAM_TIER) if isinstance(arena, dict) else None
    # The protocol gave the reply as many descriptors as these need.
    others = len(reply.fds) - len(fields["files"])
    files, shared = ControlFiles(fields["files"], reply.fds[:-others]), reply.fds[-others:]
    try:
        if not isinstance(arena, dict) or not isinstance(fields.get("table"), dict):
            raise ProtocolBroken("open reply without arena and table")
        if (kind == DRAM_TIER) is not (arenas is None):
            raise ProtocolBroken(f"open reply with an arena of kind {kind!r} of {connection.tier}")
        table_bytes = integer(fields["table"], "bytes")
        table = mappings.table(epoch, connection.tier, shared[-1], table_bytes)
        number, span_bytes = integer(arena, "arena"), integer(arena, "span_bytes")
        memory: ArenaMemory
        if arenas is None:
            mapping = mappings.arena(epoch, number, shared[0], span_bytes)
            memory, populate = mapping, mapping.populate
        else:
            arenas.begin(table.attention)
            chunks = arenas.arena(number, str(kind), span_bytes, integer(arena, "chunk_bytes"))
            memory, populate = chunks.memory, chunks.populate
        index = _index(name, files)
        return Shared(integer(fields, "model_id"), files, index, table, number, memory, populate)
    except ProtocolBroken as error:
        connection.fail(error)
        raise
    finally:
        close_all(shared)


def _index(name: str, files: Mapping[str, bytes]) -> PackIndex:
    if INDEX_FILE not in files:
        raise ProtocolBroken(f"open reply for model {name!r} without {INDEX_FILE}")
    try:
        return PackIndex.parse(files[INDEX_FILE], where=name)
    except FormatError as error:
        raise PackInvalid(f"model {name!r}: {error}", "pack_invalid") from error


def integer(fields: dict[str, Any], name: str) -> int:
    """A whole number of a reply. Raises ProtocolBroken."""
    value = fields.get(name)
    if type(value) is not int or value < 0:
        raise ProtocolBroken(f"reply field {name!r} is {value!r}, expected a whole number")
    return value
