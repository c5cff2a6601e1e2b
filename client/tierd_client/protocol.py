"""The client's half of the socket protocol, without a socket: requests out, replies in.

Sans-IO: the owner sends the bytes that `request` returns and hands every received chunk, with the
descriptors that came with it, to `receive`. Chunks may be cut anywhere; replies come in any order.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tierd_client.errors import ProtocolBroken, Refused, refusal
from tierd_layouts.errors import FormatError
from tierd_layouts.wire import (
    DRAM_TIER,
    MAX_FDS,
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    ErrorCode,
    FrameDecoder,
    encode,
)

NO_REPLY = 0  # request id of a message that wants no answer


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer. The receiver owns `fds`. `abandoned`: nobody waits for it any more."""

    request: int
    op: str
    fields: dict[str, Any]
    fds: tuple[int, ...]
    abandoned: bool

    @property
    def refusal(self) -> Refused | None:
        """The exception of an error reply, None of a good one."""
        if self.fields["ok"]:
            return None
        error = self.fields["error"]
        return refusal(self.op, error["code"], error["text"])


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request without an answer; chunks: how many it asks for."""

    op: str
    chunks: int


class ClientProtocol:
    """Matches replies to requests by id. Not thread-safe; raises ProtocolBroken on bad input."""

    def __init__(self) -> None:
        self._decoder = FrameDecoder(MAX_REPLY_BYTES)
        self._next_id = 1
        self._waiting: dict[int, _Waiting] = {}
        self._abandoned: set[int] = set()
        #: Received and not yet claimed by the frame that they came with.
        self._fds: deque[int] = deque()

    @property
    def outstanding(self) -> int:
        """Requests that were not answered yet, abandoned ones included."""
        return len(self._waiting)

    def request(self, op: str, fields: dict[str, Any]) -> tuple[int, bytes]:
        """A new request id and the bytes to send. Raises Refused when they are too many."""
        request = self._next_id
        try:
            frame = encode({"id": request, "op": op, **fields}, MAX_REQUEST_BYTES)
        except FormatError as error:
            raise Refused(f"request {op!r}: {error}", ErrorCode.BAD_REQUEST) from error
        self._next_id += 1
        chunks = fields["chunks"] if op == "chunks" else ()
        self._waiting[request] = _Waiting(op, len(chunks))
        return request, frame

    def abandon(self, request: int) -> None:
        """Nobody will wait for this reply: it comes out marked, so that its leases and
        descriptors can be given back. Unknown and answered ids are ignored."""
        if request in self._waiting:
            self._abandoned.add(request)

    def receive(self, data: bytes | memoryview, fds: Iterable[int] = ()) -> list[Reply]:
        """The replies that `data` completes.

        fds: descriptors received together with `data`. Linux ends a read behind the segment that
        carried descriptors, so they belong to the first frame that claims any, at the latest to
        the last frame that begins in `data`.
        """
        self._fds.extend(fds)
        if len(self._fds) > MAX_FDS:
            raise ProtocolBroken(f"{len(self._fds)} descriptors in one frame, at most {MAX_FDS}")
        replies: list[Reply] = []
        try:
            self._decoder.feed(data)
            replies.extend(self._reply(body) for body in self._decoder)
        except FormatError as error:
            raise ProtocolBroken(f"unreadable reply: {error}") from error
        if self._fds and not self._decoder.pending_bytes:
            raise ProtocolBroken(f"{len(self._fds)} descriptors came with a reply that names none")
        return replies

    def drop_fds(self) -> Sequence[int]:
        """Descriptors that no frame claimed, for the owner to close when the connection ends."""
        left = tuple(self._fds)
        self._fds.clear()
        return left

    def _reply(self, body: dict[str, Any]) -> Reply:
        request, ok = body.get("id"), body.get("ok")
        if type(request) is not int or type(ok) is not bool:
            raise ProtocolBroken(f"reply without id and ok: {sorted(map(str, body))}")
        if not ok:
            self._check_error(body)
            if request == NO_REPLY:  # the daemon gives up on the whole connection
                raise ProtocolBroken(f"the daemon ended the connection: {body['error']['text']}")
        waiting = self._waiting.pop(request, None)
        if waiting is None:
            raise ProtocolBroken(f"reply to request {request}, which is not outstanding")
        abandoned = request in self._abandoned
        self._abandoned.discard(request)
        return Reply(request, waiting.op, body, self._claim(waiting, body), abandoned)

    def _check_error(self, body: dict[str, Any]) -> None:
        error = body.get("error")
        if not isinstance(error, dict) or not all(
            isinstance(error.get(field), str) for field in ("code", "text")
        ):
            raise ProtocolBroken(f"error reply to request {body['id']} without code and text")

    def _claim(self, waiting: _Waiting, body: dict[str, Any]) -> tuple[int, ...]:
        """Take the descriptors of this frame: an open brings its files, in DRAM an arena, and a
        table; chunks come one descriptor each, unless one handle stands for all."""
        count = 0
        if waiting.op == "open" and body["ok"]:
            files, arena = body.get("files"), body.get("arena")
            if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
                raise ProtocolBroken("open reply without a list of file names")
            in_dram = not isinstance(arena, dict) or arena.get("kind", DRAM_TIER) == DRAM_TIER
            count = len(files) + 1 + in_dram
        elif waiting.op == "chunks" and body["ok"] and "handle" not in body:
            count = waiting.chunks
        if len(self._fds) < count:
            raise ProtocolBroken(
                f"{waiting.op} reply with {len(self._fds)} descriptors, it needs {count}"
            )
        return tuple(self._fds.popleft() for _ in range(count))
