from __future__ import annotations

import os
import signal
import subprocess
import sys
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from tierd_layouts.container import open_pack
from tierd_tools import pack as pack_module
from tierd_tools import pack_plan, pack_run
from tierd_tools.checkpoint import Checkpoint
from tierd_tools.errors import (
    CheckpointError,
    DiskFull,
    PackError,
)
from tierd_tools.pack import pack
from tierd_tools.pack_settings import Settings
from tierd_tools.pack_shard import ShardWriter
from tierd_tools.source_tensor import FileTensor
from tierd_tools.verify import verify

if TYPE_CHECKING:
    from pathlib import Path

#: Runs pack in a process that kills itself before the Nth call of a function.
KILLED = """
import importlib, os, pkgutil, signal, sys
from tierd_tools import pack, pack_plan
pack_plan.SHARD_BYTES = int(sys.argv[5])
source, target, name, number = sys.argv[1:5]
path, _, attribute = name.rpartition(".")
owner = pkgutil.resolve_name(path)
function, calls = getattr(owner, attribute), [0]
def killer(*arguments, **options):
    calls[0] += 1
    if calls[0] == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return function(*arguments, **options)
setattr(owner, attribute, killer)
pack.pack(source, target, prune="magnitude", sparsity=0.5)
"""


SYNC = "tierd_tools.pack_shard.ShardWriter.sync"
JOURNAL = "tierd_tools.pack_journal.Journal.add"


def run_and_kill(source: Path, target: Path, function: str, number: int, shard: int = 1) -> None:
    arguments = [str(source), str(target), function, str(number), str(shard)]
    command = [sys.executable, "-c", KILLED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.fixture
def source(tmp_path: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint that is packed into 5 shards: embedding, three layers, norm."""
    monkeypatch.setattr(pack_plan, "SHARD_BYTES", 1)  # a shard a layer
    written: Path = checkpoints.write(tmp_path / "m", checkpoints.llama())
    return written


def pruned_pack(source: Path, target: Path) -> Any:
    return pack(source, target, prune="magnitude", sparsity=0.5)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("function", "number", "reused"),
    [
        ("tierd_tools.pack_shard.ShardWriter.begin_layer", 1, 0),
        (SYNC, 1, 0),
        (JOURNAL, 1, 0),
        (JOURNAL, 2, 1),
        (SYNC, 4, 2),  # once for a layer, once more for its shard
        ("tierd_tools.pack_shard.ShardWriter.finish", 2, 2),
        (JOURNAL, 5, 4),
        ("tierd_tools.pack_run.copy_file", 2, 5),
        ("tierd_tools.pack_run.write_index", 1, 5),
        ("tierd_tools.pack_check.verify_layer", 3, 5),
        ("tierd_tools.pack_run.adopt_access", 1, 5),
    ],
)
def test_a_killed_run_is_resumed_and_the_old_pack_stays_until_then(
    tmp_path: Path, source: Path, function: str, number: int, reused: int
) -> None:
    pruned_pack(source, tmp_path / "expected")
    pack(source, tmp_path / "p")
    before = content(tmp_path / "p")
    run_and_kill(source, tmp_path / "p", function, number)
    assert content(tmp_path / "p") == before
    report = pruned_pack(source, tmp_path / "p")
    assert report.layers_reused == reused
    assert content(tmp_path / "p") == content(tmp_path / "expected")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["expected", "m", "p"]


@pytest.mark.parametrize("finished", [1, 3, 4])
def test_a_killed_run_goes_on_inside_a_shard_and_writes_no_finished_layer_again(
    tmp_path: Path, checkpoints: Any, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    pruned_pack(source, tmp_path / "expected")
    run_and_kill(source, tmp_path / "p", JOURNAL, finished + 1, shard=1 << 30)
    shard = tmp_path / ".p.tierd-packing" / "tierd-00001.safetensors.tmp"
    done = open_pack(tmp_path / "expected").layers[finished - 1].extents[0]
    kept = shard.read_bytes()[: done.offset + done.nbytes]
    written: list[tuple[int, int]] = []
    pwrite = os.pwrite

    def counting(fd: int, data: Any, offset: int) -> int:
        count = pwrite(fd, data, offset)
        if os.readlink(f"/proc/self/fd/{fd}") == str(shard):
            written.append((offset, count))
        return count

    monkeypatch.setattr(os, "pwrite", counting)
    read: list[str] = []
    monkeypatch.setattr(FileTensor, "read", recording(FileTensor.read, read))
    report = pruned_pack(source, tmp_path / "p")
    assert report.layers_reused == finished
    header_bytes = open_pack(tmp_path / "p").layers[0].extents[0].offset
    again = [place for place in written if header_bytes <= place[0] < len(kept)]
    assert again == []
    new = [layer.nbytes for layer in open_pack(tmp_path / "p").layers[finished:]]
    assert sum(count for _, count in written) == header_bytes + sum(new)
    first = {t.name for x in open_pack(tmp_path / "p").layers[:finished] for t in x.tensors}
    tied = {"model.embed_tokens.weight", "lm_head.weight"}  # compared before anything is planned
    assert first.intersection(read) <= tied
    assert content(tmp_path / "p") == content(tmp_path / "expected")


def recording(function: Any, names: list[str]) -> Any:
    def recorded(tensor: Any) -> Any:
        names.append(tensor.name)
        return function(tensor)

    return recorded


def test_a_run_that_is_killed_before_a_shard_has_its_name_leaves_no_part_of_a_layer(
    tmp_path: Path, source: Path
) -> None:
    run_and_kill(source, tmp_path / "p", "tierd_tools.pack_shard.ShardWriter.end_layer", 3)
    staging = tmp_path / ".p.tierd-packing"
    assert (staging / "tierd-00003.safetensors.tmp").exists()
    assert pruned_pack(source, tmp_path / "p").layers_reused == 2
    assert len(list((tmp_path / "p").glob("*.tmp"))) == 0
    verify(tmp_path / "p")


@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_a_finished_layer_that_was_damaged_meanwhile_is_written_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(pack_plan, "SHARD_BYTES", shard_bytes)
    pruned_pack(source, tmp_path / "expected")
    index = open_pack(tmp_path / "expected")
    extent = index.layers[1].extents[0]
    run_and_kill(source, tmp_path / "p", JOURNAL, 4, shard_bytes)
    (shard,) = (tmp_path / ".p.tierd-packing").glob(f"{index.shards[extent.shard].file}*")
    data = bytearray(shard.read_bytes())
    data[extent.offset + extent.nbytes - 5000] ^= 1
    shard.write_bytes(data)
    assert pruned_pack(source, tmp_path / "p").layers_reused == 1
    assert content(tmp_path / "p") == content(tmp_path / "expected")


def test_a_finished_shard_that_was_cut_or_lost_meanwhile_is_written_again(
    tmp_path: Path, source: Path
) -> None:
    for damage in (lambda file: os.truncate(file, 5000), lambda file: file.unlink()):
        run_and_kill(source, tmp_path / "p", JOURNAL, 4)
        damage(tmp_path / ".p.tierd-packing" / "tierd-00002.safetensors")
        assert pruned_pack(source, tmp_path / "p").layers_reused == 1
        verify(tmp_path / "p")


def test_other_settings_or_another_source_start_afresh(tmp_path: Path, source: Path) -> None:
    run_and_kill(source, tmp_path / "p", JOURNAL, 4)
    assert pack(source, tmp_path / "p", prune="magnitude", sparsity=0.6).layers_reused == 0
    run_and_kill(source, tmp_path / "p", JOURNAL, 4)
    shard = source / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert pruned_pack(source, tmp_path / "p").layers_reused == 0
    verify(tmp_path / "p")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": 1}', '{"job": "x", "index": ""}'])
def test_a_journal_that_is_none_starts_afresh(tmp_path: Path, source: Path, text: str) -> None:
    run_and_kill(source, tmp_path / "p", JOURNAL, 4)
    (tmp_path / ".p.tierd-packing" / ".tierd-journal").write_text(text)
    assert pruned_pack(source, tmp_path / "p").layers_reused == 0


def test_a_run_that_is_killed_after_the_exchange_leaves_the_new_pack(
    tmp_path: Path, source: Path
) -> None:
    pack(source, tmp_path / "p")
    run_and_kill(source, tmp_path / "p", "tierd_tools.pack_staging.Staging.remove", 1)
    assert "--sparsity 0.5" in open_pack(tmp_path / "p").tool
    assert (tmp_path / ".p.tierd-packing" / "tierd.json").exists()  # the old one
    pruned_pack(source, tmp_path / "p")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "p"]


def test_a_source_that_changes_while_it_is_packed_is_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count(1)

    sync = ShardWriter.sync

    def touch_and_sync(writer: ShardWriter) -> None:
        if next(calls) == 3:
            (source / "config.json").write_text("{}")
        sync(writer)

    monkeypatch.setattr(ShardWriter, "sync", touch_and_sync)
    with pytest.raises(PackError, match=r"changed while it was packed; nothing was kept"):
        pack(source, tmp_path / "p")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m"]


def test_a_source_that_shrinks_while_it_is_packed_is_refused(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    the_plan = pack_plan.plan(Checkpoint.open(source), Settings())
    monkeypatch.setattr(pack_module, "plan", lambda checkpoint, settings: the_plan)
    real = Checkpoint.open(source)
    monkeypatch.setattr(Checkpoint, "open", lambda path: real)
    os.truncate(source / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors ends at byte 100000"):
        pack(source, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_disk_that_gives_back_something_else_is_noticed(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = count(1)

    finish = ShardWriter.finish

    def finish_and_damage(writer: ShardWriter) -> Any:
        written = finish(writer)
        if next(calls) == 2:
            path = tmp_path / ".p.tierd-packing" / written.file
            with path.open("r+b") as file:
                file.seek(-8192, os.SEEK_END)
                file.write(b"\xff" * 16)
        return written

    monkeypatch.setattr(ShardWriter, "finish", finish_and_damage)
    with pytest.raises(PackError, match=r"reads back wrong: .*xxh3 is [0-9a-f]{16}.*1 of 5 layers"):
        pruned_pack(source, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    monkeypatch.undo()
    monkeypatch.setattr(pack_plan, "SHARD_BYTES", 1)
    assert pruned_pack(source, tmp_path / "p").layers_reused == 1
    verify(tmp_path / "p")


def test_what_was_done_to_layers_is_reported_by_the_run_that_takes_them_over(
    tmp_path: Path, checkpoints: Any
) -> None:
    tensors = checkpoints.llama()
    zeros = "model.layers.0.mlp.up_proj.weight"
    dtype, shape, data = tensors[zeros]
    tensors[zeros] = (dtype, shape, bytes(len(data)))
    source = checkpoints.write(tmp_path / "m", tensors)
    run_and_kill(source, tmp_path / "p", JOURNAL, 4, shard=1 << 30)
    report = pruned_pack(source, tmp_path / "p")
    assert report.layers_reused == 3
    assert (report.pruned_tensors, report.left_tensors) == (14, [zeros])


# --------------------------------------------------------------------------------------------------
# Full disks


def test_a_disk_that_is_surely_too_small_is_refused_with_both_numbers(
    tmp_path: Path, checkpoints: Any, mounted_tmpfs: Any
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama(size=256, layers=4))
    with mounted_tmpfs(tmp_path / "disk", "size=1m") as disk:
        with pytest.raises(DiskFull, match=r"needs about 3\.\d MiB, .* free; nothing was kept"):
            pack(source, disk / "p")
        assert list(disk.iterdir()) == []


def test_a_disk_that_fills_up_keeps_the_old_pack_and_the_finished_layers(
    tmp_path: Path, source: Path, mounted_tmpfs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(source, tmp_path / "expected")
    monkeypatch.setattr(pack_run, "_SURE", 0.0)
    with mounted_tmpfs(tmp_path / "disk", "size=800k") as disk:
        pruned_pack(source, disk / "p")
        before = content(disk / "p")
        with pytest.raises(DiskFull, match=r"file system full: needs about .* free; . of 5 layers"):
            pack(source, disk / "p")
        assert content(disk / "p") == before
        verify(disk / "p")
        journal = (disk / ".p.tierd-packing" / ".tierd-journal").read_bytes()
        kept = journal.count(b"\n") - 1  # a line is the job's
        assert 1 <= kept < 5
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        report = pack(source, disk / "p")
        assert report.layers_reused == kept
        assert content(disk / "p") == content(tmp_path / "expected")


def test_a_disk_that_is_full_from_the_start_leaves_nothing(
    tmp_path: Path, source: Path, mounted_tmpfs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_run, "_SURE", 0.0)
    with mounted_tmpfs(tmp_path / "disk", "size=8k") as disk:
        with pytest.raises(DiskFull, match="nothing was kept"):
            pack(source, disk / "p")
        assert list(disk.iterdir()) == []
