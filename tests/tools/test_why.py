"""One sentence says where a layer is, since when, why and for whom."""

from __future__ import annotations

from typing import Any

import pytest

from tierd_tools.why import sentence

MS, S = 1_000_000, 1_000_000_000


def answer(state: str, *history: tuple[int, str, str], **more: Any) -> dict[str, Any]:
    return {
        "tier": "dram", "gpus": {}, "model": "m", "layer": 3, "name": "model.layers.3",
        "bytes": 3 << 20, "state": state,
        "demanded": False, "leased_by": [], "quarantined": False, "waiting": [], "planned_by": [],
        "kept": False, "failed": False, "next_use": None,
        "history": [{"ago_ns": ago, "what": what, "text": text} for ago, what, text in history],
        "record": {"reaches_ns": 9 * S, "forgotten_events": 0, "forgotten_decisions": 0},
        **more,
    }  # fmt: skip


def client(number: int, name: str = "chat") -> dict[str, Any]:
    return {"client": number, "name": name}


def need(in_ns: int = 30 * MS, steps: int = 3, ppm: int = 1_000_000) -> dict[str, Any]:
    return {"client": client(12), "steps": steps, "in_ns": in_ns, "probability_ppm": ppm}


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (answer("absent"), "is not in memory: it was never asked for."),
        (
            answer("absent", record={"reaches_ns": 9 * S, "forgotten_events": 5}),
            "is not in memory, and the record does not reach back to when it last was.",
        ),
        (
            answer(
                "absent",
                (3 * S, "resident", "in slot 3"),
                (1_200 * MS, "evict", "for model.layers.9 of m: its next use is further away"),
                next_use=need(2 * S, 20),
            ),
            "was evicted 1.2 s ago, for model.layers.9 of m: its next use is further away; "
            "client 12 (chat) needs it in 2.0 s (20 steps).",
        ),
        (
            answer(
                "absent", (5 * MS, "failed", "read_failed: EIO"), (5 * MS, "evict", "its read "
                "failed"), failed=True,
            ),
            "is not in memory: its read failed 5.0 ms ago (read_failed: EIO); it is read again "
            "when somebody asks for it.",
        ),
        (
            answer("absent", (MS, "wait", "client 4 stalls for it"), waiting=[client(4, "")]),
            "is not in memory, and the record does not reach back to when it last was; client 4 "
            "waits for it, behind other reads.",
        ),
        (
            answer("reading", demanded=True, waiting=[client(1), client(2, "")]),
            "is being read, demanded by client 1 (chat) and client 2.",
        ),
        (
            answer("reading", next_use=need()),
            "is being read, ahead for client 12 (chat), who needs it in 30.0 ms (3 steps).",
        ),
        (
            answer("making room", next_use=need(0, 1)),
            "waits for memory that is being given back, to be read ahead for client 12 (chat), "
            "who was expected to need it by now (1 step away).",
        ),
        (
            answer("resident", (2 * S, "read", "into slot 3: ahead"), (S, "resident", "in slot 3"),
                next_use=need(ppm=400_000)),
            "is resident since 1.0 s ago, read ahead of any request; client 12 (chat) needs it in "
            "30.0 ms (3 steps) with a probability of 40%.",
        ),
        (
            answer("resident", (2 * S, "read", "into slot 3: demand"), (S, "resident", ""),
                leased_by=[client(7)], kept=True, planned_by=[client(7)], pinned=True),
            "is resident since 1.0 s ago, read on demand; pinned by the operator; leased by client "
            "7 (chat); one of those that stay while others of its model pass through; no plan uses "
            "it.",
        ),
        (
            answer("resident", (S, "adopt", "slot 3"), quarantined=True),
            "is resident since 1.0 s ago, when this daemon took it over from an earlier one; still "
            "read by clients of an earlier daemon; no plan uses it.",
        ),
        (
            answer("resident"),
            "is resident since before the record begins, 9.0 s ago; no plan uses it: it goes when "
            "room is needed.",
        ),
        (
            answer("resident", leased_by=[client(-2, "copies to gpu:0")],
                gpus={"gpu:0": "reading", "gpu:1": "resident"}),
            "is resident since before the record begins, 9.0 s ago; leased by copies to gpu:0; no "
            "plan uses it; it is on gpu:1 too.",
        ),
        (
            answer("absent", gpus={"gpu:0": "resident"}),
            "is not in memory: it was never asked for; it is on gpu:0.",
        ),
    ],
)  # fmt: skip
def test_the_sentence(reply: dict[str, Any], said: str) -> None:
    assert sentence(reply) == f"model.layers.3 of m (3.0 MiB) {said}"


def test_the_sentence_about_a_gpu_says_which() -> None:
    reply = answer("reading", demanded=True, waiting=[client(1)], tier="gpu:0")
    reply["gpus"] = {"gpu:0": "reading"}
    assert sentence(reply) == (
        "On gpu:0, model.layers.3 of m (3.0 MiB) is being copied, demanded by client 1 (chat)."
    )
