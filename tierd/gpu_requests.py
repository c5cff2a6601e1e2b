"""What only clients of a GPU ask: chunks to map, and what they have to unmap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tierd import fields
from tierd.errors import BadRequest
from tierd.gpu.errors import GpuError
from tierd.gpu.span import chunks_of
from tierd.gpu_memory import close_all
from tierd_layouts.wire import MAX_CHUNKS, MAX_REQUEST_ARRAY, MAX_SCRATCH_BYTES, ErrorCode

if TYPE_CHECKING:
    from tierd.gpu.device import Export
    from tierd.gpu_tier import GpuTier
    from tierd.session import Session

MAX_EXPORTING = 16  # requests for chunks of a session: each costs descriptors until it is answered
_LARGEST = (1 << 32) - 1


def chunks(session: Session, request: int, message: dict[str, Any]) -> None:
    """Hand out chunks under leases of this session. Raises BadRequest for any other."""
    gpu = _gpu_of(session, message)
    arena = fields.number(message, "arena", 0, _LARGEST)
    wanted = fields.numbers(message.get("chunks"), "chunks", 0, _LARGEST)
    if not 0 < len(wanted) <= MAX_CHUNKS or len(set(wanted)) < len(wanted):
        raise BadRequest(f"chunks: expected 1 to {MAX_CHUNKS} different numbers")
    if session.exporting >= MAX_EXPORTING:
        raise BadRequest(
            f"{session.exporting} requests for chunks wait already, which is the limit"
        )
    leased = _leased(session, gpu, arena)
    for chunk in wanted:
        if chunk not in leased:
            raise BadRequest(f"chunks: you hold no lease in chunk {chunk} of arena {arena}")

    def exported(outcome: list[Export] | GpuError) -> None:
        session.exporting -= 1
        if isinstance(outcome, GpuError):
            session.refuse(request, outcome.code, outcome.text)
            return
        fds = [export.fd for export in outcome if export.fd is not None]
        try:
            if fds:
                session.reply(request, {}, fds)
            else:
                handle = {"handle": outcome[0].handle, "nbytes": outcome[0].nbytes}
                session.reply(request, handle)
        except OSError as error:  # no descriptor is left for a reply that must wait
            session.refuse(request, ErrorCode.INTERNAL, f"no chunk can be handed out: {error}")
        finally:
            close_all(outcome)

    session.exporting += 1
    gpu.memory.export(session.client, arena, wanted, exported)


def _leased(session: Session, gpu: GpuTier, arena: int) -> set[int]:
    """The chunks in which the session holds a lease."""
    leased: set[int] = set()
    for grant in session.leases.values():
        if grant.arena == arena:
            first, count = chunks_of(grant.offset, grant.nbytes, gpu.device.chunk_bytes)
            leased.update(range(first, first + count))
    return leased


def attend(session: Session, request: int, message: dict[str, Any]) -> None:
    """Hear what the session unmapped, say what else it has to."""
    gpu = _gpu_of(session, message)
    unmapped: list[tuple[int, int]] = []
    for entry in _pairs(message.get("unmapped", [])):
        arena = fields.numbers(entry[:1], "unmapped", 0, _LARGEST)[0]
        numbers = fields.numbers(entry[1], "unmapped", 0, _LARGEST)
        unmapped += [(arena, number) for number in numbers]
    scratch = fields.number(message, "scratch_bytes", 0, MAX_SCRATCH_BYTES, default=0)
    gpu.scratch[session.client] = scratch
    gpu.memory.unmapped(session.client, unmapped)
    wanted = gpu.memory.mappings.wanted_of(session.client)
    session.reply(
        request,
        {
            "pressed": gpu.slots.table.pressed,
            "unmap": [[arena, numbers] for arena, numbers in wanted.items()],
        },
    )


def _pairs(value: object) -> list[list[Any]]:
    if (
        not isinstance(value, list)
        or len(value) > MAX_REQUEST_ARRAY
        or not all(type(entry) is list and len(entry) == 2 for entry in value)
    ):
        raise BadRequest("unmapped: expected a list of [arena, [chunks]]")
    return value


def _gpu_of(session: Session, message: dict[str, Any]) -> GpuTier:
    session.check_greeted()
    if session.gpu is None:
        raise BadRequest(f"{message['op']} is for clients of a GPU; this one is on dram")
    return session.gpu
