"""A row of `tierctl status` says what a GPU holds, and what is wrong with it."""

from __future__ import annotations

from tierd_tools.status_table import gpu_row

GPU: dict[str, object] = {
    "tier": "gpu:0", "device": "memfd", "name": "shared memory", "state": "ready", "reason": "",
    "budget_bytes": 16 << 20, "above_budget_bytes": 0, "used_bytes": 12 << 20,
    "resident_bytes": 10 << 20, "leased_bytes": 3 << 20, "in_flight_bytes": 0,
    "backed_bytes": 14 << 20, "chunk_bytes": 2 << 20, "copied_bytes": 40 << 20, "copies": 9,
    "copies_failed": 0, "copy_bytes_per_s": 5 << 30, "unpinned_bytes": 0,
    "clients_scratch_bytes": 7 << 20, "hits": 3, "misses": 1, "direct": None,
}  # fmt: skip


def test_a_gpu_is_one_row_of_what_it_holds() -> None:
    text = gpu_row(GPU)
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
    text = gpu_row(GPU | {"direct": direct})
    assert "6.0 MiB in 2 layers past DRAM" in text
    assert "cuFile counts 8.0 MiB in 5 direct reads and 0 through DRAM" in text
    assert "layers failed" not in text
    assert "3 layers failed" in gpu_row(GPU | {"direct": direct | {"failed": 3}})


def test_what_is_wrong_with_a_gpu_is_in_its_row() -> None:
    wrong = {
        "above_budget_bytes": 2 << 20, "copies_failed": 2, "unpinned_bytes": 1 << 20,
        "reason": "the driver is busy", "hits": 0, "misses": 0,
    }  # fmt: skip
    text = gpu_row(GPU | wrong)
    assert "(2.0 MiB above, goes as leases end)" in text
    assert "1.0 MiB not pinned, 2 failed; the driver is busy" in text


def test_a_gpu_that_does_not_work_says_why() -> None:
    assert gpu_row(GPU | {"state": "opening"}) == "memfd, opening"
    failed = GPU | {"state": "failed", "reason": "there is no driver: install one"}
    assert gpu_row(failed) == "memfd, failed: there is no driver: install one"
