from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierd_client.errors import LayerNotFound, ModelNotFound, ProtocolBroken, Refused, TierdError
from tierd_client.protocol import ClientProtocol, Reply
from tierd_layouts.wire import MAX_REPLY_BYTES, ErrorCode, FrameDecoder, encode


def asked(*ops: str) -> tuple[ClientProtocol, list[int]]:
    protocol = ClientProtocol()
    return protocol, [protocol.request(op, {})[0] for op in ops]


def refused(code: str, *, op: str = "status") -> Refused:
    protocol, (request,) = asked(op)
    error = {"code": code, "text": "the text"}
    (reply,) = protocol.receive(encode({"id": request, "ok": False, "error": error}))
    assert reply.refusal is not None
    return reply.refusal


def test_a_request_is_one_frame_with_its_id_and_op() -> None:
    protocol = ClientProtocol()
    first, frame = protocol.request("acquire", {"layer": 3})
    second, _ = protocol.request("acquire", {"layer": 3})
    decoder = FrameDecoder()
    decoder.feed(frame)
    assert list(decoder) == [{"id": first, "op": "acquire", "layer": 3}]
    assert 0 < first < second


def test_a_request_too_large_for_a_frame_is_refused_here_with_both_sizes() -> None:
    protocol = ClientProtocol()
    with pytest.raises(Refused, match=r"request 'plan': .* the limit is 65536") as caught:
        protocol.request("plan", {"order": list(range(100_000))})
    assert caught.value.code == "bad_request"
    assert protocol.request("status", {})[0] == 1


@given(data=st.data(), count=st.integers(1, 12))
def test_replies_in_any_order_and_any_chunking_reach_their_requests(
    data: st.DataObject, count: int
) -> None:
    ops = data.draw(st.lists(st.sampled_from(["acquire", "status"]), min_size=count))
    protocol, requests = asked(*ops)
    given_up = data.draw(st.sets(st.sampled_from(requests)))
    for request in given_up:
        protocol.abandon(request)
    order = data.draw(st.permutations(requests))
    stream = b"".join(encode({"id": r, "ok": True, "payload": "x" * r}) for r in order)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))) | {0, len(stream)})
    replies: list[Reply] = []
    for begin, end in pairwise(cuts):
        replies += protocol.receive(stream[begin:end])
    assert [reply.request for reply in replies] == order
    assert all(len(reply.fields["payload"]) == reply.request for reply in replies)
    assert [reply.op for reply in replies] == [ops[requests.index(r)] for r in order]
    assert {reply.request for reply in replies if reply.abandoned} == given_up
    assert protocol.outstanding == 0


@given(data=st.data())
def test_descriptors_go_to_the_open_that_they_came_with(data: st.DataObject) -> None:
    ops = data.draw(st.lists(st.sampled_from(["open", "status"]), min_size=1, max_size=6))
    protocol, requests = asked(*ops)
    next_fd = 1000
    expected, seen = [], []
    for request, op in zip(requests, ops, strict=True):
        body: dict[str, Any] = {"id": request, "ok": True}
        fds: list[int] = []
        if op == "open":
            names = data.draw(st.lists(st.text("abc", min_size=1), max_size=3, unique=True))
            body["files"] = names
            fds = list(range(next_fd, next_fd + len(names) + 2))
            next_fd += len(fds)
        frame = encode(body)
        expected.append(tuple(fds))
        # As the kernel delivers it: the descriptors come with the first byte of their frame.
        cut = data.draw(st.integers(1, len(frame)))
        seen += protocol.receive(frame[:cut], fds)
        seen += protocol.receive(frame[cut:])
    assert [reply.fds for reply in seen] == expected
    assert not protocol.drop_fds()


def test_a_frame_may_precede_the_frame_with_descriptors_in_one_chunk() -> None:
    protocol, (status, opened) = asked("status", "open")
    stream = encode({"id": status, "ok": True}) + encode({"id": opened, "ok": True, "files": ["a"]})
    first, second = protocol.receive(stream, [10, 11, 12])
    assert (first.fds, second.fds) == ((), (10, 11, 12))


def test_descriptors_that_no_reply_names_break_the_protocol_and_are_not_forgotten() -> None:
    protocol, (request,) = asked("status")
    with pytest.raises(ProtocolBroken, match="1 descriptors came with a reply that names none"):
        protocol.receive(encode({"id": request, "ok": True}), [10])
    assert protocol.drop_fds() == (10,)


def test_an_open_without_its_descriptors_breaks_the_protocol() -> None:
    protocol, (request,) = asked("open")
    with pytest.raises(ProtocolBroken, match="with 1 descriptors, it needs 3"):
        protocol.receive(encode({"id": request, "ok": True, "files": ["a"]}), [10])


@pytest.mark.parametrize("files", [None, 3, [1], "names"])
def test_an_open_with_unusable_file_names_breaks_the_protocol(files: object) -> None:
    protocol, (request,) = asked("open")
    with pytest.raises(ProtocolBroken, match="list of file names"):
        protocol.receive(encode({"id": request, "ok": True, "files": files}), [10, 11])


def test_seventeen_descriptors_break_the_protocol() -> None:
    protocol, _ = asked("open")
    with pytest.raises(ProtocolBroken, match="17 descriptors in one frame, at most 16"):
        protocol.receive(b"\0", list(range(17)))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"ok": True}, "without id and ok"),
        ({"id": 1}, "without id and ok"),
        ({"id": True, "ok": True}, "without id and ok"),
        ({"id": 1, "ok": 1}, "without id and ok"),
        ({"id": 1, "ok": False}, "without code and text"),
        ({"id": 1, "ok": False, "error": {"code": "x"}}, "without code and text"),
        ({"id": 1, "ok": False, "error": {"code": 3, "text": "x"}}, "without code and text"),
        ({"id": 2, "ok": True}, "reply to request 2, which is not outstanding"),
        (
            {"id": 0, "ok": False, "error": {"code": "too_many_clients", "text": "64 is enough"}},
            "64 is enough",
        ),
    ],
)
def test_a_reply_that_cannot_be_is_named(body: dict[str, Any], text: str) -> None:
    protocol, _ = asked("status")
    with pytest.raises(ProtocolBroken, match=text):
        protocol.receive(encode(body))


def test_a_second_reply_to_one_request_breaks_the_protocol() -> None:
    protocol, (request,) = asked("status")
    protocol.receive(encode({"id": request, "ok": True}))
    with pytest.raises(ProtocolBroken, match="not outstanding"):
        protocol.receive(encode({"id": request, "ok": True}))


@pytest.mark.parametrize(
    "stream", [b"\0\0\0\1\xc1", b"\0\0\0\1\x01", (MAX_REPLY_BYTES + 1).to_bytes(4, "big")]
)
def test_bytes_that_are_no_frame_break_the_protocol(stream: bytes) -> None:
    protocol, _ = asked("status")
    with pytest.raises(ProtocolBroken, match="unreadable reply"):
        protocol.receive(stream)


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_wire_code_has_an_exception_that_carries_text_and_code(code: ErrorCode) -> None:
    error = refused(code)
    assert isinstance(error, TierdError)
    assert error.code == code
    assert str(error) == "the text"
    special = {ErrorCode.BAD_REQUEST, ErrorCode.UNKNOWN_OP, ErrorCode.INTERNAL}
    assert (type(error) is Refused) == (code in special)


def test_a_code_of_a_newer_daemon_is_kept() -> None:
    error = refused("flying_saucer")
    assert type(error) is Refused
    assert error.code == "flying_saucer"


def test_not_found_means_the_layer_where_a_layer_was_asked_for() -> None:
    assert isinstance(refused("not_found", op="open"), ModelNotFound)
    assert isinstance(refused("not_found", op="acquire"), LayerNotFound)
    assert isinstance(refused("not_found", op="plan"), LayerNotFound)


@pytest.mark.parametrize(("kind", "count"), [("dram", 3), ("memfd", 2), ("cuda_vmm", 2)])
def test_an_open_on_a_gpu_brings_no_arena(kind: str, count: int) -> None:
    protocol, (request,) = asked("open")
    body = {"id": request, "ok": True, "files": ["a"], "arena": {"arena": 1, "kind": kind}}
    (reply,) = protocol.receive(encode(body), range(100, 100 + count))
    assert reply.fds == tuple(range(100, 100 + count))
    assert protocol.drop_fds() == ()


def test_chunks_bring_a_descriptor_each_unless_one_handle_stands_for_all() -> None:
    protocol = ClientProtocol()
    requests = [protocol.request("chunks", {"chunks": chunks})[0] for chunks in ([4, 5, 9], [1])]
    (reply,) = protocol.receive(encode({"id": requests[0], "ok": True}), [100, 101, 102])
    assert reply.fds == (100, 101, 102)
    (reply,) = protocol.receive(encode({"id": requests[1], "ok": True, "handle": b"h"}))
    assert reply.fds == ()


def test_chunks_without_their_descriptors_break_the_protocol() -> None:
    protocol = ClientProtocol()
    request, _ = protocol.request("chunks", {"chunks": [4, 5]})
    with pytest.raises(ProtocolBroken, match="chunks reply with 1 descriptors, it needs 2"):
        protocol.receive(encode({"id": request, "ok": True}), [100])


def test_refused_chunks_bring_nothing() -> None:
    protocol = ClientProtocol()
    request, _ = protocol.request("chunks", {"chunks": [4, 5]})
    error = {"code": "bad_request", "text": "no lease of yours"}
    (reply,) = protocol.receive(encode({"id": request, "ok": False, "error": error}))
    assert reply.fds == ()
