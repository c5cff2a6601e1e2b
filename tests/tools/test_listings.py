"""Lists of what a daemon has are read in a log as in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tierd_tools import listings

if TYPE_CHECKING:
    import pytest


def test_that_nobody_is_connected_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    listings.clients({"clients": []})
    assert capsys.readouterr().out == "no client is connected\n"


CLIENT: dict[str, object] = {
    "client": 12345, "name": "python3[4711]", "pid": 1234567, "uid": 1000,
    "model": "llama-3-70b-lossless", "tier": "gpu:0", "scratch_bytes": 240 << 20, "position": 41,
    "leases": 3, "leased_bytes": 3 << 30, "reserved_bytes": 5 << 30, "granted": 123_456,
    "weight": 10, "read_bytes": 77 << 30, "plan": "explicit", "tokens_per_pass": 1,
    "stall_ns": 12 * 10**9, "connected_ns": 10**13,
    "predicted": {"stall_ns": 5 * 10**8, "ns_per_token": 10**9, "binds": "ssd"},
}  # fmt: skip


def test_two_tables_of_clients_fit_into_a_log_and_break_no_word(
    capsys: pytest.CaptureFixture[str],
) -> None:
    listings.clients({"clients": [CLIENT, CLIENT | {"client": 12346}]})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line] == ["CLIENT", "12345", "12346"] * 2
    assert {"llama-3-70b-lossless", "RESERVED", "python3[4711]", "1234567/1000"} <= set(
        lines[0] + lines[1]
    )
    assert lines[4][-2:] == ["PREDICTED", "STALL"]
    assert lines[5][-1] == "(ssd)"
