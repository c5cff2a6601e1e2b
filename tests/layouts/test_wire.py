from __future__ import annotations

import contextlib
import os
import struct
import tracemalloc
from typing import TYPE_CHECKING, Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tierd_layouts import wire
from tierd_layouts.errors import (
    FrameTooLarge,
    MalformedFrame,
    NoSocketPath,
    SocketPathEmpty,
    SocketPathTooLong,
)
from tierd_layouts.wire import MAX_REPLY_BYTES, MAX_REQUEST_BYTES, FrameDecoder, encode

if TYPE_CHECKING:
    from pathlib import Path

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.text(max_size=20),
    st.binary(max_size=20),
)
messages = st.dictionaries(
    st.text(max_size=10),
    st.one_of(scalars, st.lists(scalars, max_size=4), st.dictionaries(st.text(), scalars)),
    max_size=6,
)


def frame(body: bytes) -> bytes:
    return struct.pack("!I", len(body)) + body


def decode_one(body: bytes, limit: int = MAX_REQUEST_BYTES) -> dict[str, Any]:
    decoder = FrameDecoder(limit)
    decoder.feed(frame(body))
    return next(decoder)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(messages, max_size=5), st.data())
def test_any_chunking_gives_the_same_messages(
    sent: list[dict[str, Any]], data: st.DataObject
) -> None:
    stream = b"".join(encode(message) for message in sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    decoder = FrameDecoder(MAX_REPLY_BYTES)
    received: list[dict[str, Any]] = []
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        decoder.feed(stream[begin:end])
        received.extend(decoder)
    assert received == sent
    assert decoder.pending_bytes == 0


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.binary(max_size=60), max_size=4), st.sampled_from([64, MAX_REQUEST_BYTES]))
def test_arbitrary_bytes_give_messages_or_named_errors(chunks: list[bytes], limit: int) -> None:
    decoder = FrameDecoder(limit)
    try:
        for chunk in chunks:
            decoder.feed(chunk)
            for message in decoder:
                assert isinstance(message, dict)
    except (FrameTooLarge, MalformedFrame):
        pass


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=100))
def test_arbitrary_bodies_spoil_only_their_own_frame(body: bytes) -> None:
    decoder = FrameDecoder()
    decoder.feed(frame(body) + encode({"id": 7}))
    with contextlib.suppress(MalformedFrame):
        assert isinstance(next(decoder), dict)
    assert next(decoder) == {"id": 7}
    assert list(decoder) == []


def test_the_length_is_big_endian_and_counts_the_body() -> None:
    assert encode({"id": 1}) == b"\x00\x00\x00\x05\x81\xa2id\x01"


def test_a_frame_above_its_limit_is_refused_from_its_length_alone() -> None:
    decoder = FrameDecoder(100)
    decoder.feed(struct.pack("!I", 101))
    with pytest.raises(FrameTooLarge, match="101 bytes, the limit is 100"):
        next(decoder)
    assert decoder.pending_bytes == 0


def test_after_a_frame_too_large_the_stream_cannot_be_followed() -> None:
    decoder = FrameDecoder(100)
    decoder.feed(b"\xff\xff\xff\xff" + encode({"id": 1}))
    with pytest.raises(FrameTooLarge):
        next(decoder)
    with pytest.raises(FrameTooLarge):
        next(decoder)
    with pytest.raises(FrameTooLarge):
        decoder.feed(encode({"id": 1}))


def test_a_frame_at_the_limit_passes_and_one_byte_more_does_not() -> None:
    overhead = len(encode({"k": b""})) - 4 + 1  # a bin 16 header is one byte longer
    message = {"k": b"x" * (1000 - overhead)}
    assert len(encode(message, limit=1000)) == 1004
    decoder = FrameDecoder(1000)
    decoder.feed(encode(message, limit=1000))
    assert next(decoder) == message
    with pytest.raises(FrameTooLarge, match="1000 bytes, the limit is 999"):
        encode(message, limit=999)


def test_a_number_that_no_frame_can_hold_is_refused_by_encode() -> None:
    with pytest.raises(MalformedFrame, match="64 bits"):
        encode({"layer": 1 << 64})


def test_a_plan_over_many_layers_fits_into_a_request() -> None:
    message = {"id": 1, "op": "plan", "model_id": 1, "order": list(range(16000)), "lookahead": 1}
    decoder = FrameDecoder()
    decoder.feed(encode(message, limit=MAX_REQUEST_BYTES))
    assert next(decoder) == message


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x01", id="not a map"),
        pytest.param(b"\x91\x80", id="a list"),
        pytest.param(b"\x81\x01\x02", id="an integer key"),
        pytest.param(b"\x81\xc4\x01a\x02", id="a bytes key"),
        pytest.param(b"\x81\xa1a", id="incomplete"),
        pytest.param(b"\x80\x80", id="more than one object"),
        pytest.param(b"\x81\xa1a\xa1\xff", id="text that is not UTF-8"),
        pytest.param(b"\x81\xa1a\xc1", id="the byte that msgpack never uses"),
        pytest.param(b"\x81\xa1a\xd4\x05x", id="an extension"),
        pytest.param(b"\x81\xa1a\xc7\x00\x05", id="an empty extension"),
        pytest.param(b"\x81\xa1a\xd6\xff\x00\x00\x00\x00", id="a timestamp"),
        pytest.param(b"\x81\xa1a" + b"\x91" * 60000, id="deep nesting"),
        pytest.param(b"\x81\xa1a" + b"\x91" * 3000 + b"\x01", id="deep nesting, complete"),
        pytest.param(b"\x81\xa1a\xdd\x7f\xff\xff\xff", id="array32 of 2^31 - 1"),
        pytest.param(b"\x81\xa1a\xdc\x40\x01" + b"\x01" * 0x4001, id="array of 16385"),
        pytest.param(b"\xdf\x7f\xff\xff\xff", id="map32 of 2^31 - 1"),
        pytest.param(msgpack.packb({str(i): 0 for i in range(257)}), id="a map of 257"),
        pytest.param(msgpack.packb({"a": "x" * 4097}), id="a text of 4097 bytes"),
    ],
)
def test_a_body_that_is_not_one_small_map_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedFrame, match=f"frame of {len(body)} bytes"):
        decode_one(body)


def test_a_client_takes_long_replies() -> None:
    message = {"rows": [{"name": "x" * 5000} for _ in range(300)], "n": list(range(20000))}
    assert decode_one(msgpack.packb(message), MAX_REPLY_BYTES) == message


def test_nested_claims_of_length_cost_no_memory() -> None:
    body = b"\x81\xa1a" + b"\xdc\x40\x00" * 900  # 900 arrays of 16384, none of them there
    tracemalloc.start()
    with pytest.raises(MalformedFrame):
        decode_one(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20, f"{peak} bytes for a frame of {len(body)}"


def test_error_codes_are_the_stable_words_of_the_protocol() -> None:
    assert set(wire.ErrorCode) == {
        "bad_request",
        "version_mismatch",
        "unknown_op",
        "not_found",
        "not_admitted",
        "budget_too_small",
        "lease_limit",
        "pack_invalid",
        "checksum_mismatch",
        "read_failed",
        "access_denied",
        "model_removed",
        "shutting_down",
        "too_many_clients",
        "tier_unavailable",
        "copy_failed",
        "internal",
    }
    assert encode({"code": wire.ErrorCode.NOT_FOUND}) == encode({"code": "not_found"})


# --------------------------------------------------------------------------------------------------
# Where the socket is


def test_an_explicit_socket_wins_over_the_variable() -> None:
    environ = {"TIERD_SOCKET": "/b"}
    assert wire.resolve_socket("/a", for_listening=False, environ=environ) == "/a"
    assert wire.resolve_socket(None, for_listening=True, environ=environ) == "/b"


@pytest.fixture
def system_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run" / "tierd" / "tierd.sock"
    monkeypatch.setattr(wire, "SYSTEM_SOCKET", str(path))
    return path


def test_a_client_takes_the_first_socket_that_exists(system_socket: Path, tmp_path: Path) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    own = tmp_path / "tierd.sock"
    own.touch()
    assert wire.resolve_socket(None, for_listening=False, environ=environ) == str(own)
    system_socket.parent.mkdir(parents=True)
    system_socket.touch()
    assert wire.resolve_socket(None, for_listening=False, environ=environ) == str(system_socket)


def test_a_client_without_a_daemon_gets_a_path_that_its_error_can_name(
    system_socket: Path, tmp_path: Path
) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path), "TIERD_SOCKET": ""}
    found = wire.resolve_socket(None, for_listening=False, environ=environ)
    assert found == str(tmp_path / "tierd.sock")
    assert wire.resolve_socket(None, for_listening=False, environ={}) == str(system_socket)


def test_the_daemon_takes_the_first_directory_that_it_can_write(
    system_socket: Path, tmp_path: Path
) -> None:
    environ = {"XDG_RUNTIME_DIR": str(tmp_path)}
    own = str(tmp_path / "tierd.sock")
    assert wire.resolve_socket(None, for_listening=True, environ=environ) == own
    system_socket.parent.mkdir(parents=True)
    assert wire.resolve_socket(None, for_listening=True, environ=environ) == str(system_socket)


def test_a_daemon_that_can_write_nowhere_is_told_what_to_give(system_socket: Path) -> None:
    with pytest.raises(NoSocketPath, match=r"--socket, TIERD_SOCKET or XDG_RUNTIME_DIR"):
        wire.resolve_socket(None, for_listening=True, environ={"XDG_RUNTIME_DIR": "/nowhere"})


@pytest.mark.parametrize("path", ["/" + "x" * 107, "/a\0b"])
def test_a_path_that_no_socket_can_have_is_refused(path: str) -> None:
    with pytest.raises(SocketPathTooLong, match="the limit is 107"):
        wire.resolve_socket(path, for_listening=False)


@pytest.mark.parametrize("for_listening", [True, False])
def test_an_empty_path_is_refused_and_an_empty_variable_is_none(
    for_listening: bool, system_socket: Path
) -> None:
    with pytest.raises(SocketPathEmpty, match="socket '' is no path"):
        wire.resolve_socket("", for_listening=for_listening, environ={"TIERD_SOCKET": "/other"})
    system_socket.parent.mkdir(parents=True)
    found = wire.resolve_socket(None, for_listening=for_listening, environ={"TIERD_SOCKET": ""})
    assert found == str(system_socket)


def test_the_default_is_the_rule_without_an_explicit_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TIERD_SOCKET", "/from/the/environment")
    assert wire.resolve_socket(None, for_listening=False) == "/from/the/environment"
