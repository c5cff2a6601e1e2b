"""A GPU made of ordinary memory, in a real daemon: hello, open, copies, chunks, budgets."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.conftest import OpenedOnGpu, Refused, wait_until, write_pack
from tests.daemon.gpu_daemon import (
    CHUNK,
    LAYER_BYTES,
    LAYERS,
    MIB,
    arguments,
    gpu_status,
    on_gpu,
)

if TYPE_CHECKING:
    from tests.daemon.conftest import PackOnDisk, RunningDaemon
    from tests.daemon.gpu_daemon import Connect, Start


@pytest.fixture
def pack(models: Path) -> PackOnDisk:
    return write_pack(models / "m", LAYERS, LAYER_BYTES)


@pytest.fixture
def daemon(start_daemon: Start, models: Path, pack: PackOnDisk) -> RunningDaemon:
    """DRAM for three layers, a GPU for three."""
    return start_daemon(*arguments(models))


def test_hello_names_the_tier_and_the_device(daemon: RunningDaemon, connect: Connect) -> None:
    reply = connect(daemon, greet=False).hello(tier="gpu:0")
    assert reply["tier"] == "gpu:0"
    assert reply["device"] == {"kind": "memfd", "number": 0, "uuid": "memfd-0"}
    assert "gpu" in reply["capabilities"]
    reply = connect(daemon, greet=False).hello()
    assert reply["tier"] == "dram"
    assert "device" not in reply


def test_a_tier_that_is_not_there_is_refused_with_those_that_are(
    daemon: RunningDaemon, connect: Connect
) -> None:
    client = connect(daemon, greet=False)
    with pytest.raises(Refused) as caught:
        client.hello(tier="gpu:1")
    assert caught.value.code == "tier_unavailable"
    assert caught.value.text == "there is no tier gpu:1 here; there are dram, gpu:0"
    with pytest.raises(Refused, match="bad_request: hello: tier is 3"):
        client.hello(tier=3)
    assert client.hello()["tier"] == "dram", "a refused hello does not spoil the connection"


def test_every_layer_is_granted_on_the_gpu_with_its_bytes(
    daemon: RunningDaemon, connect: Connect, pack: PackOnDisk
) -> None:
    opened = on_gpu(connect, daemon)
    opened.plan(list(range(LAYERS)))
    for layer in [*range(LAYERS), 2, 0]:
        lease = opened.acquire(layer)
        assert lease["bytes"] == LAYER_BYTES
        assert lease["arena"] == opened.number
        assert opened.bytes_of(lease) == pack.content[layer]
        assert opened.table.generation(lease["slot"]) == lease["generation"]
        assert [held.lease for held in opened.table.leases()] == [lease["lease"]]
        opened.release(lease)
        opened.obey()
    assert list(opened.table.leases()) == []
    status = gpu_status(daemon)
    assert status["copies"] >= LAYERS
    assert status["copied_bytes"] >= LAYERS * LAYER_BYTES
    assert status["backed_bytes"] <= status["budget_bytes"] == 12 * MIB


def test_a_layer_that_is_on_the_gpu_is_not_copied_again(
    daemon: RunningDaemon, connect: Connect, pack: PackOnDisk
) -> None:
    first, second = on_gpu(connect, daemon), on_gpu(connect, daemon)
    lease = first.acquire(1)
    copies = gpu_status(daemon)["copies"]
    other = second.acquire(1)
    assert (other["slot"], other["generation"]) == (lease["slot"], lease["generation"])
    assert gpu_status(daemon)["copies"] == copies
    assert first.bytes_of(lease) == second.bytes_of(other) == pack.content[1]


def test_clients_of_dram_and_of_the_gpu_are_served_side_by_side(
    daemon: RunningDaemon, connect: Connect, pack: PackOnDisk
) -> None:
    here, there = connect(daemon).open("m"), on_gpu(connect, daemon)
    for layer in range(LAYERS):
        leases = here.acquire(layer), there.acquire(layer)
        assert here.bytes_of(leases[0]) == there.bytes_of(leases[1]) == pack.content[layer]
        here.release(leases[0])
        there.release(leases[1])
        there.obey()
    shown = daemon.ask("clients")["clients"]
    assert [client["tier"] for client in shown] == ["dram", "gpu:0"]


def test_only_chunks_under_a_lease_of_one_s_own_are_given(
    daemon: RunningDaemon, connect: Connect
) -> None:
    opened, other = on_gpu(connect, daemon), on_gpu(connect, daemon)
    lease = opened.acquire(0)
    (first, second) = opened.chunks_of(lease)
    for arena, numbers in [
        (opened.number, [first, 5000]),
        (opened.number + 1, [first]),
        (0, [first]),
        (opened.number, []),
        (opened.number, [first, first]),
        (opened.number, list(range(17))),
        (opened.number, ["x"]),
        (-1, [first]),
    ]:
        assert opened.client.refusal("chunks", arena=arena, chunks=numbers).code == "bad_request"
    refusal = other.client.refusal("chunks", arena=opened.number, chunks=[first])
    assert refusal.code == "bad_request"
    assert f"chunk {first} of arena {opened.number}" in refusal.text
    opened.map([second, first])
    opened.release(lease)
    assert (
        opened.client.refusal("chunks", arena=opened.number, chunks=[first]).code == "bad_request"
    )
    assert opened.client.take_fds() == []


def test_a_chunk_cannot_be_written_by_who_has_it(daemon: RunningDaemon, connect: Connect) -> None:
    opened = on_gpu(connect, daemon)
    lease = opened.acquire(0)
    opened.client.call("chunks", arena=opened.number, chunks=opened.chunks_of(lease))
    for fd in opened.client.take_fds():
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
        os.close(fd)


def test_what_is_for_clients_of_a_gpu_is_refused_to_others(
    daemon: RunningDaemon, connect: Connect
) -> None:
    client = connect(daemon)
    for op in ("chunks", "attend"):
        refusal = client.refusal(op, arena=0, chunks=[0], unmapped=[], scratch_bytes=0)
        assert (refusal.code, refusal.text) == (
            "bad_request",
            f"{op} is for clients of a GPU; this one is on dram",
        )
        assert connect(daemon, greet=False).refusal(op).code == "bad_request"


@pytest.mark.parametrize(
    "fields",
    [
        {"unmapped": 3},
        {"unmapped": [3]},
        {"unmapped": [[1]]},
        {"unmapped": [[1, 2]]},
        {"unmapped": [["x", []]]},
        {"unmapped": [[1, [-1]]]},
        {"scratch_bytes": -1},
        {"scratch_bytes": 1 << 60},
        {"scratch_bytes": "1GiB"},
    ],
)
def test_an_attend_that_means_nothing_is_refused(
    daemon: RunningDaemon, connect: Connect, fields: dict[str, Any]
) -> None:
    client = connect(daemon, tier="gpu:0")
    message = {"unmapped": [], "scratch_bytes": 0, **fields}
    assert client.refusal("attend", **message).code == "bad_request"
    assert client.call("attend", unmapped=[[1, [2, 3]], [9, []]], scratch_bytes=0)["unmap"] == []


def test_scratch_of_clients_is_shown_until_they_leave(
    daemon: RunningDaemon, connect: Connect
) -> None:
    first, second = on_gpu(connect, daemon), on_gpu(connect, daemon)
    first.attend(scratch_bytes=100)
    second.attend(scratch_bytes=23)
    assert gpu_status(daemon)["clients_scratch_bytes"] == 123
    assert [client["scratch_bytes"] for client in daemon.ask("clients")["clients"]] == [100, 23]
    second.client.close()
    wait_until(lambda: gpu_status(daemon)["clients_scratch_bytes"] == 100, "it is gone")


def test_layers_says_what_is_on_which_gpu(daemon: RunningDaemon, connect: Connect) -> None:
    opened = on_gpu(connect, daemon)
    lease = opened.acquire(2)
    shown = daemon.ask("layers", model="m")["layers"]
    assert shown[2]["gpus"] == {
        "gpu:0": {"state": "resident", "leases": 1, "slot": lease["slot"],
            "generation": lease["generation"]},
    }  # fmt: skip
    assert shown[0]["gpus"]["gpu:0"]["state"] == "absent"


def test_why_knows_a_layer_on_each_tier(daemon: RunningDaemon, connect: Connect) -> None:
    opened = on_gpu(connect, daemon)
    opened.plan(list(range(LAYERS)))
    before = daemon.ask("why", model="m", layer=2, tier="gpu:0")
    assert (before["tier"], before["state"], before["leased_by"]) == ("gpu:0", "absent", [])
    opened.acquire(2)
    (client,) = daemon.ask("clients")["clients"]
    there = daemon.ask("why", model="m", layer=2, tier="gpu:0")
    assert there["state"] == "resident"
    assert there["leased_by"] == [{"client": client["client"], "name": "test"}]
    assert {"read", "resident"} <= {told["what"] for told in there["history"]}
    here = daemon.ask("why", model="m", layer=2)
    assert here["tier"] == "dram"
    assert here["gpus"] == {"gpu:0": "resident"}
    assert {planner["name"] for planner in here["planned_by"]} <= {"copies to gpu:0"}
    with pytest.raises(Refused, match="there is no tier gpu:4 here"):
        daemon.ask("why", model="m", layer=2, tier="gpu:4")


def test_a_model_that_is_served_later_is_placed_on_the_gpu_too(
    daemon: RunningDaemon, connect: Connect, models: Path
) -> None:
    more = write_pack(models / "more", 2, LAYER_BYTES, seed=5)
    assert daemon.ask("reload")["added"] == ["more"]
    opened = on_gpu(connect, daemon, "more")
    lease = opened.acquire(1)
    assert opened.bytes_of(lease) == more.content[1]
    (models / "more").rename(models.parent / "aside")
    assert daemon.ask("reload")["removed"] == ["more"]
    assert opened.client.refusal("acquire", model_id=opened.model_id, layer=0).code == (
        "model_removed"
    )
    assert opened.bytes_of(lease) == more.content[1]
    opened.release(lease)


def test_models_of_other_readers_have_an_arena_of_their_own(
    daemon: RunningDaemon, connect: Connect, models: Path
) -> None:
    secret = write_pack(models / "secret", 2, LAYER_BYTES, seed=9)
    (secret.path / "tierd.json").chmod(0o600)
    daemon.ask("reload")
    opened, other = on_gpu(connect, daemon, "secret"), on_gpu(connect, daemon)
    assert opened.number != other.number
    lease = opened.acquire(0)
    assert opened.bytes_of(lease) == secret.content[0]
    assert other.client.refusal("chunks", arena=opened.number, chunks=[0]).code == "bad_request"


def test_a_layer_that_is_damaged_is_refused_on_the_gpu_as_in_dram(
    daemon: RunningDaemon, connect: Connect, pack: PackOnDisk
) -> None:
    pack.flip_byte(3)
    opened = on_gpu(connect, daemon)
    refusal = opened.client.refusal("acquire", model_id=opened.model_id, layer=3)
    assert refusal.code == "checksum_mismatch"
    lease = opened.acquire(2)
    assert opened.bytes_of(lease) == pack.content[2]


def test_a_plan_that_the_gpu_has_no_room_for_is_refused_with_the_numbers(
    start_daemon: Start, models: Path, pack: PackOnDisk, connect: Connect
) -> None:
    daemon = start_daemon(*arguments(models, f"0={CHUNK}"))
    opened = on_gpu(connect, daemon)
    refusal = opened.client.refusal("plan", model_id=opened.model_id, order=[0, 1])
    assert refusal.code == "budget_too_small"
    assert str(2 * CHUNK) in refusal.text


def test_two_gpus_have_budgets_and_slots_of_their_own(
    start_daemon: Start, models: Path, pack: PackOnDisk, connect: Connect
) -> None:
    daemon = start_daemon(*arguments(models, f"0={8 * MIB}"), "--gpu", f"3={6 * MIB}")
    wait_until(lambda: gpu_status(daemon, 3)["state"] == "ready", "it is open")
    time.sleep(1.5)  # until DRAM is registered, for all GPUs once
    opened = {name: connect(daemon, tier=name).open("m") for name in ("gpu:0", "gpu:3")}
    for model in opened.values():
        assert isinstance(model, OpenedOnGpu)
        assert model.bytes_of(model.acquire(1)) == pack.content[1]
    first, second = gpu_status(daemon, 0), gpu_status(daemon, 3)
    assert (first["budget_bytes"], second["budget_bytes"]) == (8 * MIB, 6 * MIB)
    assert first["leased_bytes"] == second["leased_bytes"] == LAYER_BYTES


def test_a_slow_copy_engine_is_awaited_by_the_grant(
    start_daemon: Start, models: Path, pack: PackOnDisk, connect: Connect
) -> None:
    daemon = start_daemon(*arguments(models), "--gpu-copy-bandwidth", "10MB/s")
    opened = on_gpu(connect, daemon)
    begin = time.monotonic()
    lease = opened.acquire(0)
    assert time.monotonic() - begin >= LAYER_BYTES / 10e6
    assert opened.bytes_of(lease) == pack.content[0]


def test_a_clean_stop_ends_copies_and_answers_who_waits(
    start_daemon: Start, models: Path, pack: PackOnDisk, connect: Connect
) -> None:
    daemon = start_daemon(*arguments(models), "--gpu-copy-latency-us", "700000")
    opened = on_gpu(connect, daemon)
    request = opened.client.send("acquire", model_id=opened.model_id, layer=0)
    wait_until(lambda: gpu_status(daemon)["in_flight_bytes"], "the copy is under way")
    daemon.process.terminate()
    with pytest.raises(Refused) as caught:
        opened.client.receive(request)
    assert caught.value.code == "shutting_down"
    assert daemon.process.wait(20) == 0
    assert "Traceback" not in daemon.log_text()


def mapped(daemon: RunningDaemon) -> str:
    return Path(f"/proc/{daemon.pid}/maps").read_text()


def test_no_library_of_a_gpu_is_loaded_without_one(daemon: RunningDaemon) -> None:
    assert not any(name in mapped(daemon) for name in ("libcuda", "cupy", "cuda/bindings"))


@pytest.mark.parametrize("kind", ["cuda_vmm", "cuda_ipc"])
def test_a_node_without_a_gpu_serves_dram_and_says_what_is_missing(
    start_daemon: Start, models: Path, pack: PackOnDisk, connect: Connect, kind: str
) -> None:
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("this node may have a GPU")
    daemon = start_daemon("--models", models, "--dram", "12MiB", "--gpu", "0=12MiB",
        "--gpu-device", kind)  # fmt: skip
    opened = connect(daemon).open("m")
    assert opened.bytes_of(opened.acquire(0)) == pack.content[0]
    wait_until(lambda: gpu_status(daemon)["state"] == "failed", "it cannot be opened")
    reason = gpu_status(daemon)["reason"]
    assert "gpu:0" in reason
    refusal = connect(daemon, greet=False).refusal("hello", version=1, client="x", tier="gpu:0")
    assert refusal.code == "tier_unavailable"
    assert reason in refusal.text


@pytest.mark.parametrize("tier", ["dram", "gpu:0"])
def test_clients_of_each_tier_are_told_whether_others_want_the_memory(
    daemon: RunningDaemon, connect: Connect, models: Path, tier: str
) -> None:
    write_pack(models / "small", 1, LAYER_BYTES, seed=3)
    daemon.ask("reload")
    first, second = connect(daemon, tier=tier), connect(daemon, tier=tier)
    small, large = first.open("small"), second.open("m")
    small.plan([0])
    assert not small.table.pressed, "all of it fits"
    large.plan(list(range(LAYERS)))
    assert small.table.pressed
    second.call("close", model_id=large.model_id)
    wait_until(lambda: not small.table.pressed, "all of it fits again", 1.0)
    if tier == "gpu:0":
        assert first.call("attend", unmapped=[], scratch_bytes=0)["pressed"] is False


@pytest.mark.parametrize("tier", ["dram", "gpu:0"])
def test_a_client_that_keeps_leases_which_others_want_is_named(
    daemon: RunningDaemon, connect: Connect, models: Path, tier: str
) -> None:
    write_pack(models / "small", 3, 256 << 10, seed=3)
    daemon.ask("reload")

    def named() -> list[str]:
        return [note for note in daemon.status()["notes"] if "gave none back" in note]

    keeper, other = connect(daemon, tier=tier), connect(daemon, tier=tier)
    small, large = keeper.open("small"), other.open("m")
    small.plan([0, 1, 2])
    leases = [small.acquire(layer) for layer in range(3)]
    assert not small.table.pressed
    time.sleep(1.0)
    large.plan(list(range(LAYERS)))
    assert small.table.pressed
    assert named() == []
    (note,) = wait_until(named, "it is named", 10.0)
    assert "keeps 3 leases" in note
    other.call("close", model_id=large.model_id)  # it went away: the keeper is named nevertheless
    wait_until(lambda: not small.table.pressed, "all of it fits again", 1.0)
    assert len(named()) == 1
    assert f"pid {os.getpid()}" in note
    small.release(leases[0])
    assert named() == []
