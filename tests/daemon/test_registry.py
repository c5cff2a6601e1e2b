"""Which packs are served, and what a reload changes, with and without leases on them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
from typing import TYPE_CHECKING, Any

import pytest

from tests.daemon.conftest import PackOnDisk, RawClient, Refused, wait_until, write_pack
from tierd.errors import ModelNotFound, PackInvalid
from tierd.registry import Registry, scan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.daemon.conftest import RunningDaemon
    from tierd.registry import Changes

    Start = Callable[..., RunningDaemon]
    Connect = Callable[..., RawClient]


@pytest.fixture
def registry() -> Any:
    registry = Registry()
    yield registry
    for pack in list(registry.by_model.values()):
        pack.close()


def look(registry: Registry, models: list[Path], packs: list[Path] | None = None) -> Changes:
    return registry.apply(scan(models, packs or [], registry.identities()))


def test_a_pack_is_a_sub_directory_with_an_index(registry: Registry, models: Path) -> None:
    write_pack(models / "one")
    (models / "notes").mkdir()
    (models / "file").write_text("")
    write_pack(models / ".packing")
    changes = look(registry, [models])
    assert [pack.name for pack in changes.added] == ["one"]
    assert changes.failed == []
    assert set(registry.served["one"].files) == {"tierd.json", "config.json"}


def test_a_name_that_is_not_safe_is_reported_and_not_served(
    registry: Registry, models: Path
) -> None:
    write_pack(models / "sp ace")
    changes = look(registry, [models])
    assert changes.added == []
    assert "sp ace" in changes.failed[0][1]


def test_a_broken_pack_does_not_disturb_the_others(registry: Registry, models: Path) -> None:
    write_pack(models / "good")
    bad = write_pack(models / "bad")
    os.truncate(bad.path / "tierd-00001.safetensors", 5000)
    changes = look(registry, [models])
    assert [pack.name for pack in changes.added] == ["good"]
    assert changes.failed[0][0] == "bad"
    assert "tierd-00001.safetensors" in changes.failed[0][1]
    with pytest.raises(PackInvalid, match="tierd-00001"):
        registry.find("bad")
    with pytest.raises(ModelNotFound):
        registry.find("other")


def test_links_inside_a_pack_are_not_followed(registry: Registry, models: Path) -> None:
    pack = write_pack(models / "linked")
    shard = pack.path / "tierd-00001.safetensors"
    shard.rename(models / "elsewhere")
    shard.symlink_to(models / "elsewhere")
    changes = look(registry, [models])
    assert changes.added == []
    assert changes.failed[0][0] == "linked"


def test_a_fifo_in_place_of_a_file_does_not_hang_the_scan(registry: Registry, models: Path) -> None:
    pack = write_pack(models / "piped")
    (pack.path / "config.json").unlink()
    os.mkfifo(pack.path / "config.json")
    changes = look(registry, [models])
    assert "config.json" in changes.failed[0][1]


def test_the_same_name_twice_is_reported_and_the_first_is_served(
    registry: Registry, models: Path, tmp_path: Path
) -> None:
    first = write_pack(models / "twin")
    write_pack(tmp_path / "others" / "twin", seed=1)
    changes = look(registry, [models, tmp_path / "others"])
    assert [pack.path for pack in changes.added] == [first.path]
    assert "two packs have the name 'twin'" in changes.failed[0][1]


def test_a_pack_that_two_settings_show_is_one_pack(registry: Registry, models: Path) -> None:
    pack = write_pack(models / "shown")
    changes = look(registry, [models], [pack.path])
    assert [pack.name for pack in changes.added] == ["shown"]
    assert changes.failed == []


def test_an_entry_that_cannot_be_looked_into_does_not_hide_the_packs_beside_it(
    registry: Registry, models: Path
) -> None:
    write_pack(models / "good")
    for name in ("lost+found", "locked"):  # a link that no stat gets through, root's neither
        (models / name).symlink_to("x" * 300)
    changes = look(registry, [models])
    assert [pack.name for pack in changes.added] == ["good"]
    assert str(models) not in dict(changes.failed)
    assert "lost+found" not in dict(changes.failed)


def test_an_unchanged_pack_is_not_opened_again(registry: Registry, models: Path) -> None:
    write_pack(models / "same")
    look(registry, [models])
    before = registry.served["same"]
    changes = look(registry, [models])
    assert (changes.added, changes.replaced, changes.removed) == ([], [], [])
    assert registry.served["same"] is before


@pytest.mark.parametrize("how", ["content", "mode", "shard"])
def test_a_changed_pack_is_a_new_model(registry: Registry, models: Path, how: str) -> None:
    pack = write_pack(models / "new")
    look(registry, [models])
    if how == "content":
        shutil.rmtree(pack.path)
        write_pack(pack.path, seed=5)
    elif how == "mode":
        (pack.path / "tierd.json").chmod(0o600)
    else:
        pack.flip_byte(0)
        os.utime(pack.path / "tierd-00001.safetensors", ns=(1, 1))
    ((old, new),) = look(registry, [models]).replaced
    assert new.model > old.model
    assert registry.find("new") is new
    assert set(registry.by_model) == {old.model, new.model}


def test_a_pack_that_breaks_stays_in_service_as_it_was(registry: Registry, models: Path) -> None:
    pack = write_pack(models / "breaks")
    look(registry, [models])
    (pack.path / "tierd.json").write_text("{}")
    changes = look(registry, [models])
    assert "stays in service" in changes.failed[0][1]
    assert registry.find("breaks").index == pack.index


def test_a_directory_that_cannot_be_listed_takes_nothing_out_of_service(
    registry: Registry, models: Path
) -> None:
    write_pack(models / "kept")
    look(registry, [models])
    models.rename(models.with_name("unmounted"))
    changes = look(registry, [models])
    assert changes.removed == []
    assert "kept" in changes.failed[0][1]
    assert registry.find("kept")


def test_a_single_pack_that_is_taken_away_is_removed(registry: Registry, tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "single")
    look(registry, [], [pack.path])
    shutil.rmtree(pack.path)
    changes = look(registry, [], [pack.path])
    assert [gone.name for gone in changes.removed] == ["single"]
    with pytest.raises(ModelNotFound):
        registry.find("single")


# -------------------------------------------------------------------------------- while it serves


@pytest.fixture
def served(start_daemon: Start, models: Path) -> tuple[RunningDaemon, PackOnDisk]:
    pack = write_pack(models / "m", 4)
    return start_daemon("--models", models, "--dram", "16MiB"), pack


def test_a_pack_that_is_added_is_served_after_a_reload(
    served: tuple[RunningDaemon, PackOnDisk], models: Path, connect: Connect
) -> None:
    daemon, _ = served
    client = connect(daemon)
    assert client.refusal("open", model="later").code == "not_found"
    later = write_pack(models / "later", seed=9)
    assert client.call("reload")["added"] == ["later"]
    opened = client.open("later")
    assert opened.bytes_of(opened.acquire(0)) == later.content[0]


def test_a_replaced_pack_lives_on_for_those_who_have_it_open(
    served: tuple[RunningDaemon, PackOnDisk], models: Path, connect: Connect
) -> None:
    daemon, old = served
    before = connect(daemon).open("m")
    lease = before.acquire(0)
    shutil.rmtree(old.path)
    new = write_pack(old.path, 4, seed=1)
    assert before.client.call("reload")["replaced"] == ["m"]
    after = connect(daemon).open("m")
    assert after.model_id != before.model_id
    for layer in range(4):
        assert after.bytes_of(after.acquire(layer)) == new.content[layer]
        assert before.bytes_of(before.acquire(layer)) == old.content[layer]
    assert before.bytes_of(lease) == old.content[0]
    assert before.table.generation(lease["slot"]) == lease["generation"]
    states = {row["model_id"]: row["state"] for row in daemon.ask("models")["models"]}
    assert states == {before.model_id: "replaced", after.model_id: "served"}
    shard = str(old.path / "tierd-00001.safetensors")
    assert f"{shard} (deleted)" in open_files(daemon)
    before.client.close()
    wait_until(lambda: len(daemon.ask("models")["models"]) == 1, "the old version is gone")
    wait_until(
        lambda: f"{shard} (deleted)" not in open_files(daemon), "the old version's files are closed"
    )
    assert shard in open_files(daemon)


def open_files(daemon: RunningDaemon) -> list[str]:
    names = []
    for fd in os.listdir(f"/proc/{daemon.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/{daemon.pid}/fd/{fd}"))
    return names


def test_a_removed_model_is_refused_but_its_leases_live_on(
    served: tuple[RunningDaemon, PackOnDisk], connect: Connect
) -> None:
    daemon, pack = served
    opened = connect(daemon).open("m")
    lease = opened.acquire(0)
    shutil.rmtree(pack.path)
    assert opened.client.call("reload")["removed"] == ["m"]
    assert opened.bytes_of(lease) == pack.content[0]
    assert opened.table.generation(lease["slot"]) == lease["generation"]
    with pytest.raises(Refused) as caught:
        opened.acquire(1)
    assert caught.value.code == "model_removed"
    assert opened.client.refusal("open", model="m").code == "not_found"
    opened.client.call("release", leases=[lease["lease"]])
    assert daemon.status()["dram"]["resident_bytes"] == 0
    opened.client.call("close", model_id=opened.model_id)


def test_who_waits_for_a_layer_of_a_removed_model_is_told(
    start_daemon: Start, models: Path, connect: Connect
) -> None:
    pack = write_pack(models / "slow", 2, 16 << 20)
    daemon = start_daemon("--models", models, "--dram", "64MiB", "--ssd-bandwidth", "4MiB")
    opened = connect(daemon).open("slow")
    waiting = opened.client.send("acquire", model_id=opened.model_id, layer=0)
    wait_until(lambda: daemon.status()["dram"]["in_flight_bytes"], "the read began")
    shutil.rmtree(pack.path)
    daemon.ask("reload")
    with pytest.raises(Refused) as caught:
        opened.client.receive(waiting)
    assert caught.value.code == "model_removed"


def test_a_broken_pack_is_reported_by_reload_models_and_open(
    served: tuple[RunningDaemon, PackOnDisk], models: Path, connect: Connect
) -> None:
    daemon, _ = served
    bad = write_pack(models / "bad")
    (bad.path / "tierd-00001.safetensors").unlink()
    client = connect(daemon)
    (failure,) = client.call("reload")["failed"]
    assert failure["name"] == "bad"
    assert "tierd-00001.safetensors" in failure["text"]
    states = {row["name"]: row["state"] for row in daemon.ask("models")["models"]}
    assert states["m"] == "served"
    assert states["bad"].startswith("failed: ")
    refusal = client.refusal("open", model="bad")
    assert refusal.code == "pack_invalid"
    assert "tierd-00001.safetensors" in refusal.text


def test_sighup_reloads(served: tuple[RunningDaemon, PackOnDisk], models: Path) -> None:
    daemon, _ = served
    write_pack(models / "later")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(daemon.ask("models")["models"]) == 2, "the pack is served")


def test_a_pack_with_other_readers_gets_an_arena_of_its_own(
    served: tuple[RunningDaemon, PackOnDisk], models: Path, connect: Connect
) -> None:
    daemon, _ = served
    private = write_pack(models / "private", seed=3)
    (private.path / "tierd.json").chmod(0o600)
    client = connect(daemon)
    client.call("reload")
    theirs, ours = client.open("private"), connect(daemon).open("m")
    lease = theirs.acquire(0)
    assert lease["arena"] != ours.acquire(0)["arena"]
    assert theirs.bytes_of(lease) == private.content[0]
