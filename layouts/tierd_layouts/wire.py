"""Socket frames: u32 big-endian length, then one msgpack map. No I/O here.

The same file says where the socket is, because daemon, client and tierctl must agree.
Source: FORMAT.md, section "Wire".
"""

from __future__ import annotations

import os
import struct
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]

from tierd_layouts.errors import (
    FrameTooLarge,
    MalformedFrame,
    NoSocketPath,
    SocketPathEmpty,
    SocketPathTooLong,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PROTOCOL_VERSION = 1
MAX_REQUEST_BYTES = 64 << 10  #: body of a frame, client to daemon
MAX_REPLY_BYTES = 4 << 20  #: body of a frame, daemon to client
MAX_FDS = 16  #: descriptors that may travel with one frame
#: A plan names every layer once, so arrays of a request may be long; maps and texts may not.
MAX_REQUEST_ARRAY = 16384
MAX_REQUEST_MAP = 256
MAX_REQUEST_TEXT = 4096
MAX_HINT_STEPS = 1 << 16  #: a hint looks so far ahead
MAX_CHUNKS = MAX_FDS  #: chunks of a GPU's arena that one request may ask for
MAX_SCRATCH_BYTES = 1 << 50  #: that a client may say it uses of a GPU's memory for itself

#: What hello's `capabilities` says of a daemon that knows tiers, `chunks`, `attend`, and keeps
#: `pressed` and `attention` of its slot tables up to date.
GPU_CAPABILITY = "gpu"
DRAM_TIER = "dram"
GPU_TIER_PREFIX = "gpu:"

SYSTEM_SOCKET = "/run/tierd/tierd.sock"
SOCKET_VARIABLE = "TIERD_SOCKET"
MAX_SOCKET_PATH_BYTES = 107  #: sun_path has 108 with its NUL

_LENGTH = struct.Struct("!I")
_TEXT_ONLY = frozenset((str,))
SMALL_FRAME_BYTES = 256
_SMALL_LIMITS = {
    "max_array_len": SMALL_FRAME_BYTES,
    "max_map_len": SMALL_FRAME_BYTES,
    "max_str_len": SMALL_FRAME_BYTES,
    "max_bin_len": SMALL_FRAME_BYTES,
    "max_ext_len": 0,
}

Message = dict[str, Any]


class ErrorCode(StrEnum):
    """Stable codes of error replies. The text beside them is for people and may change."""

    BAD_REQUEST = "bad_request"
    VERSION_MISMATCH = "version_mismatch"
    UNKNOWN_OP = "unknown_op"
    NOT_FOUND = "not_found"  #: model or layer
    NOT_ADMITTED = "not_admitted"
    BUDGET_TOO_SMALL = "budget_too_small"
    LEASE_LIMIT = "lease_limit"
    PACK_INVALID = "pack_invalid"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    READ_FAILED = "read_failed"
    ACCESS_DENIED = "access_denied"
    MODEL_REMOVED = "model_removed"
    SHUTTING_DOWN = "shutting_down"
    TOO_MANY_CLIENTS = "too_many_clients"
    TIER_UNAVAILABLE = "tier_unavailable"  #: no such tier, or its device does not work
    COPY_FAILED = "copy_failed"  #: from DRAM to a GPU
    INTERNAL = "internal"


def encode(message: Mapping[str, Any], limit: int = MAX_REPLY_BYTES) -> bytes:
    """Returns one frame. Raises FrameTooLarge when the body is above `limit` bytes, MalformedFrame
    for a number that no frame can hold.

    A client passes `limit=MAX_REQUEST_BYTES`, so that it learns about an oversized request from
    this error and not from a closed connection.
    """
    try:
        body: bytes = msgpack.packb(message, use_bin_type=True)
    except OverflowError as error:
        raise MalformedFrame("a number of the message has more than 64 bits") from error
    if len(body) > limit:
        raise FrameTooLarge(f"frame body has {len(body)} bytes, the limit is {limit}")
    return _LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Cuts a byte stream into messages.

    `feed` takes what arrived, in any chunking; iterating yields every complete message and stops
    where the next frame is not complete yet. MalformedFrame spoils one frame: iterate again for the
    next. FrameTooLarge is final: every later `feed` or iteration raises it again.
    """

    def __init__(self, limit: int = MAX_REQUEST_BYTES) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._begin = 0  # [0, _begin) of the buffer is consumed
        self._too_large: str | None = None
        # A daemon's limits are strict because anybody may connect. A client trusts its daemon, and
        # its diagnostics replies may be one long list.
        strict = limit <= MAX_REQUEST_BYTES
        self._unpack_limits = {
            "max_array_len": MAX_REQUEST_ARRAY if strict else limit,
            "max_map_len": MAX_REQUEST_MAP if strict else limit,
            "max_str_len": MAX_REQUEST_TEXT if strict else limit,
            "max_bin_len": limit,
            "max_ext_len": 0,
        }

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that is not complete yet: 0 at a clean end of stream."""
        return len(self._buffer) - self._begin

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Takes the next bytes of the stream. Raises FrameTooLarge again after the first."""
        if self._too_large is not None:
            raise FrameTooLarge(self._too_large)
        del self._buffer[: self._begin]
        self._begin = 0
        self._buffer += data

    def __iter__(self) -> Iterator[Message]:
        return self

    def __next__(self) -> Message:
        if self._too_large is not None:
            raise FrameTooLarge(self._too_large)
        if self.pending_bytes < _LENGTH.size:
            raise StopIteration
        (nbytes,) = _LENGTH.unpack_from(self._buffer, self._begin)
        if nbytes > self._limit:
            # Refused from the length alone: nothing is ever buffered for it.
            self._too_large = f"frame body has {nbytes} bytes, the limit is {self._limit}"
            self._buffer.clear()
            self._begin = 0
            raise FrameTooLarge(self._too_large)
        if self.pending_bytes < _LENGTH.size + nbytes:
            raise StopIteration
        begin = self._begin + _LENGTH.size
        self._begin = begin + nbytes
        return self._decode(bytes(self._buffer[begin : begin + nbytes]))

    def _decode(self, body: bytes) -> Message:
        try:
            # msgpack allocates an array at its claimed length, before its elements: nested claims
            # of 16384 made 68 MB out of 3 KB. Skipping allocates nothing and proves that every
            # claimed element is there, so the real pass stays linear in the frame's size. In a
            # small frame no claim may exceed the frame itself, which is as good and much quicker.
            limits = self._unpack_limits
            if len(body) <= SMALL_FRAME_BYTES:
                limits = _SMALL_LIMITS
            else:
                checker = msgpack.Unpacker(max_buffer_size=max(self._limit, 1))
                checker.feed(body)
                checker.skip()
            message = msgpack.unpackb(
                body, raw=False, strict_map_key=True, ext_hook=_refuse_ext, **limits
            )
        except (ValueError, RecursionError, msgpack.OutOfData) as error:
            text = str(error) or type(error).__name__
            raise MalformedFrame(f"frame of {len(body)} bytes: {text[:200]}") from error
        if type(message) is not dict or not _TEXT_ONLY.issuperset(map(type, message)):
            raise MalformedFrame(f"frame of {len(body)} bytes is not a map with text keys")
        return message


def resolve_socket(
    explicit: str | None, *, for_listening: bool, environ: Mapping[str, str] | None = None
) -> str:
    """Returns the socket's path: `explicit`, else $TIERD_SOCKET, else the first that fits of
    /run/tierd/tierd.sock and $XDG_RUNTIME_DIR/tierd.sock.

    Fits: for a client, the socket exists; for the daemon (`for_listening`), its directory is
    writable. A client that finds none gets the last candidate, so that its error can name it.
    Raises SocketPathEmpty, SocketPathTooLong; NoSocketPath when the daemon may write in neither
    directory.
    """
    if explicit == "":  # an unset variable of a script must not end at another daemon
        raise SocketPathEmpty(
            "socket '' is no path; where none is named (no --socket, None) the usual places are "
            "looked at"
        )
    environ = os.environ if environ is None else environ
    chosen = explicit or environ.get(SOCKET_VARIABLE)
    if chosen:
        return _check_socket_path(chosen)
    candidates = [SYSTEM_SOCKET]
    if environ.get("XDG_RUNTIME_DIR"):
        candidates.append(os.path.join(environ["XDG_RUNTIME_DIR"], "tierd.sock"))
    for path in candidates:
        if for_listening:
            fits = os.access(os.path.dirname(path), os.W_OK | os.X_OK)
        else:
            fits = os.path.exists(path)
        if fits:
            return _check_socket_path(path)
    if for_listening:
        tried = " nor ".join(os.path.dirname(path) for path in candidates)
        raise NoSocketPath(
            f"no place for the socket: cannot write in {tried}; "
            f"give --socket, {SOCKET_VARIABLE} or XDG_RUNTIME_DIR"
        )
    return _check_socket_path(candidates[-1])


def _check_socket_path(path: str) -> str:
    nbytes = len(os.fsencode(path))
    if nbytes > MAX_SOCKET_PATH_BYTES or "\0" in path:
        raise SocketPathTooLong(
            f"socket path {path!r} has {nbytes} bytes, the limit is {MAX_SOCKET_PATH_BYTES}"
        )
    return path


def _refuse_ext(code: int, data: bytes) -> object:
    raise ValueError(f"extension type {code} ({len(data)} bytes) is not allowed")
