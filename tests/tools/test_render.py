"""What daemons and clients say is printed as it is, and commands no terminal."""

from __future__ import annotations

import pytest

from tierd_tools import render


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("[/x]", "[/x]"),
        ("[bold]chat[/]", "[bold]chat[/]"),
        (":smile:", ":smile:"),
        ("\x1b]0;mine\x07\x9b2J", r"\x1b]0;mine\x07\x9b2J"),
        ("two\nlines", r"two\nlines"),
    ],
)
def test_a_client_may_call_itself_anything(
    name: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    render.why({"sentence": f"leased by client 3 ({name})"})
    assert capsys.readouterr().out == f"leased by client 3 ({shown})\n"
    render.reload({"added": [], "replaced": [], "removed": [name], "failed": []})
    assert capsys.readouterr().out == f"removed {shown}\n"
    render.config({"config": [{"key": "models", "value": name, "source": "flag"}]})
    assert shown in capsys.readouterr().out


GPU: dict[str, object] = {
    "tier": "gpu:0", "device": "memfd", "name": "shared memory", "state": "ready", "reason": "",
    "budget_bytes": 16 << 20, "above_budget_bytes": 0, "used_bytes": 12 << 20,
    "resident_bytes": 10 << 20, "leased_bytes": 3 << 20, "in_flight_bytes": 0,
    "backed_bytes": 14 << 20, "chunk_bytes": 2 << 20, "copied_bytes": 40 << 20, "copies": 9,
    "copies_failed": 0, "copy_bytes_per_s": 5 << 30, "unpinned_bytes": 0,
    "clients_scratch_bytes": 7 << 20, "hits": 3, "misses": 1, "direct": None,
}  # fmt: skip


def test_a_gpu_is_one_row_of_what_it_holds() -> None:
    text = render.gpu_row(GPU)
    assert text.startswith("shared memory (memfd): 12.0 MiB of 16.0 MiB used, 10.0 MiB resident")
    assert "14.0 MiB taken in chunks of 2.0 MiB, clients use 7.0 MiB beside" in text
    assert "40.0 MiB in 9 copies at 5.0 GiB/s" in text
    assert "of 4 layers asked for 75.0% were there" in text
    assert not any(word in text for word in ("above", "failed", "pinned", "cuFile"))


def test_what_came_past_dram_stands_beside_what_cufile_counted() -> None:
    direct = {
        "layers": 2, "bytes": 6 << 20, "failed": 0, "cufile_bytes": 8 << 20,
        "cufile_direct_reads": 5, "cufile_posix_reads": 0,
    }  # fmt: skip
    text = render.gpu_row(GPU | {"direct": direct})
    assert "6.0 MiB in 2 layers past DRAM" in text
    assert "cuFile counts 8.0 MiB in 5 direct reads and 0 through DRAM" in text
    assert "layers failed" not in text
    assert "3 layers failed" in render.gpu_row(GPU | {"direct": direct | {"failed": 3}})


def test_what_is_wrong_with_a_gpu_is_in_its_row() -> None:
    wrong = {
        "above_budget_bytes": 2 << 20, "copies_failed": 2, "unpinned_bytes": 1 << 20,
        "reason": "the driver is busy", "hits": 0, "misses": 0,
    }  # fmt: skip
    text = render.gpu_row(GPU | wrong)
    assert "(2.0 MiB above, goes as leases end)" in text
    assert "1.0 MiB not pinned, 2 failed; the driver is busy" in text


def test_a_gpu_that_does_not_work_says_why() -> None:
    assert render.gpu_row(GPU | {"state": "opening"}) == "memfd, opening"
    failed = GPU | {"state": "failed", "reason": "there is no driver: install one"}
    assert render.gpu_row(failed) == "memfd, failed: there is no driver: install one"


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
    render.clients({"clients": [CLIENT, CLIENT | {"client": 12346}]})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines if line] == ["CLIENT", "12345", "12346"] * 2
    assert {"llama-3-70b-lossless", "RESERVED", "python3[4711]", "1234567/1000"} <= set(
        lines[0] + lines[1]
    )
    assert lines[4][-2:] == ["PREDICTED", "STALL"]
    assert lines[5][-1] == "(ssd)"
