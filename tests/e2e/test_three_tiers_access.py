"""Who may read and who may write what lies on a GPU: views, chunks, and groups of readers."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon import as_nobody
from tests.daemon.conftest import PackOnDisk, Refused, RunningDaemon, write_pack
from tests.e2e.gpu_client import GpuClient, GpuModel, damaged_blocks

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
LAYERS, LAYER_BYTES, CHUNK_BYTES = 4, 3 * MIB, 2 * MIB


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PackOnDisk]:
    """Two groups of readers: `open` is for everybody, `private` for root."""
    models = tmp_path_factory.mktemp("access") / "models"
    found = {}
    for seed, (name, mode) in enumerate((("open", 0o644), ("private", 0o600))):
        found[name] = write_pack(models / name, LAYERS, LAYER_BYTES, seed)
        (models / name / "tierd.json").chmod(mode)
    return found


@pytest.fixture(scope="module")
def daemon(
    packs: dict[str, PackOnDisk], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningDaemon]:
    # pytest's directory is for its owner only; the socket must be reachable by others.
    place = tempfile.mkdtemp()
    os.chmod(place, 0o755)
    flags = ["--models", str(packs["open"].path.parent), "--dram", "64MiB", "--gpu", "0=32MiB"]
    flags += ["--gpu-device", "memfd", "--gpu-chunk", str(CHUNK_BYTES), "--socket-mode", "0666"]
    running = RunningDaemon(f"{place}/s", tmp_path_factory.mktemp("access-log") / "log", flags)
    try:
        yield running.wait_ready()
    finally:
        running.kill()
        shutil.rmtree(place)


@pytest.fixture
def reader(daemon: RunningDaemon) -> Iterator[GpuClient]:
    client = GpuClient(daemon.socket)
    client.greet()
    yield client
    client.close()


def chunk_fd(model: GpuModel, chunk: int) -> int:
    """The descriptor of a chunk, as the daemon hands it out."""
    model.client.receive(model.send_chunks([chunk]))
    (fd,) = model.client.take_fds()
    return fd


# ------------------------------------------------------------------------------------------ writing

WRITER = textwrap.dedent(
    """
    import sys
    import torch
    from tierd_client.client import Client
    with Client(sys.argv[1], tier="gpu:0") as client:
        with client.lease("open", "model.layers.0") as lease:
            view = lease["model.layers.0.weight"].view()
            assert view.view(torch.int16).count_nonzero() > 0
            print("read", flush=True)
            view.add_(1)
            print("written", flush=True)
    """
)


def test_writing_in_place_through_a_view_kills_the_writer_and_changes_no_byte(
    daemon: RunningDaemon, packs: dict[str, PackOnDisk], reader: GpuClient
) -> None:
    model, record = reader.open_gpu("open"), packs["open"].index.layers[0]
    grant = model.acquire(0)
    model.map(grant)
    command = [sys.executable, "-c", WRITER, daemon.socket]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.split() == ["read"], done.stderr
    assert done.returncode == -signal.SIGSEGV, "its pages are for reading"
    assert damaged_blocks(model.bytes_of(grant), record) == []


def test_a_chunk_is_handed_out_for_reading_only(reader: GpuClient) -> None:
    model = reader.open_gpu("open")
    grant = model.acquire(0)
    fd = chunk_fd(model, model.chunks_of(grant)[0])
    try:
        assert os.fstat(fd).st_size == CHUNK_BYTES
        with pytest.raises(PermissionError):
            mmap.mmap(fd, CHUNK_BYTES, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match=r"Bad file descriptor|Invalid argument"):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(OSError, match=r"Invalid argument|not permitted"):
            os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def test_what_is_written_round_the_mapping_is_found_by_the_checksum(
    packs: dict[str, PackOnDisk], reader: GpuClient
) -> None:
    # Root, and the daemon's own user, can open a chunk again for writing: that is why checksums
    # are what the tests of this folder look at.
    model, record = reader.open_gpu("open"), packs["open"].index.layers[1]
    grant = model.acquire(1)
    model.map(grant)
    assert damaged_blocks(model.bytes_of(grant), record) == []
    fd = chunk_fd(model, model.chunks_of(grant)[0])
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    at = grant["offset"] % CHUNK_BYTES + 1000
    before = os.pread(again, 1, at)
    os.pwrite(again, bytes([before[0] ^ 1]), at)
    assert damaged_blocks(model.bytes_of(grant), record) == [0]
    os.pwrite(again, before, at)
    assert damaged_blocks(model.bytes_of(grant), record) == []
    os.close(fd)
    os.close(again)


# ------------------------------------------------------------------------------------------- groups


def test_two_groups_of_readers_have_arenas_of_their_own_on_one_gpu(
    packs: dict[str, PackOnDisk], reader: GpuClient
) -> None:
    models = {name: reader.open_gpu(name) for name in packs}
    assert models["open"].arena != models["private"].arena
    for name, model in models.items():
        for layer, record in enumerate(packs[name].index.layers):
            assert damaged_blocks(model.read(layer), record) == []


def test_a_chunk_without_a_lease_in_it_is_refused(reader: GpuClient) -> None:
    models = {name: reader.open_gpu(name) for name in ("open", "private")}
    grant = models["open"].acquire(0)
    own = models["open"].chunks_of(grant)
    strangers = [
        (models["private"].arena, own[0]),  # leased, but in the other arena
        (models["open"].arena, own[-1] + 1),
        (models["open"].arena, 1 << 40),
        (models["open"].arena, -1),
        (1 << 30, 0),
    ]
    for arena, chunk in strangers:
        refusal = reader.refusal("chunks", arena=arena, chunks=[chunk])
        assert refusal.code == "bad_request", (arena, chunk)
    many = reader.refusal("chunks", arena=models["open"].arena, chunks=own[:1] * 17)
    assert many.code == "bad_request"
    models["open"].release(grant)
    gone = reader.refusal("chunks", arena=models["open"].arena, chunks=own[:1])
    assert gone.code == "bad_request"
    assert reader.take_fds() == []


TRY_EVERYTHING = textwrap.dedent(
    """
    from tests.daemon.conftest import Refused
    from tests.e2e.gpu_client import GpuClient
    become_nobody()
    client = GpuClient(sys.argv[1])
    client.greet()
    model = client.open_gpu("open")
    grant = model.acquire(0)
    model.map(grant)
    print("open", len(model.bytes_of(grant)))
    fd = None
    client.receive(model.send_chunks(model.chunks_of(grant)[:1]))
    (fd,) = client.take_fds()
    try:
        os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    except PermissionError:
        print("reopen refused")
    try:
        client.open_gpu("private")
    except Refused as refused:
        print("private", refused.code)
    for arena in sys.argv[2].split(","):
        for chunk in range(8):
            try:
                client.call("chunks", arena=int(arena), chunks=[chunk])
                print("got a chunk of another group")
            except Refused as refused:
                assert refused.code == "bad_request", refused
    print("no chunk", len(client.take_fds()))
    try:
        client.call("budget", tier="gpu:0", bytes=1 << 30)
    except Refused as refused:
        print("budget", refused.code)
    """
)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
def test_another_user_maps_no_chunk_of_a_group_it_is_not_in(
    daemon: RunningDaemon, reader: GpuClient
) -> None:
    private = reader.open_gpu("private")
    held = private.acquire(0)  # so that there are chunks with memory to be had
    private.map(held)
    assert as_nobody.lines(TRY_EVERYTHING, daemon.socket, str(private.arena)) == [
        f"open {LAYER_BYTES}", "reopen refused", "private access_denied", "no chunk 0",
        "budget access_denied",
    ]  # fmt: skip


def test_a_tier_that_does_not_exist_is_refused_by_name(daemon: RunningDaemon) -> None:
    for tier in ("gpu:1", "gpu:", "gpu:x", "ssd", ""):
        client = GpuClient(daemon.socket)
        try:
            with pytest.raises(Refused) as refused:
                client.greet(tier)
            assert refused.value.code in ("tier_unavailable", "bad_request")
            if tier == "gpu:1":
                assert refused.value.code == "tier_unavailable"
                assert "gpu:0" in refused.value.text
                assert "dram" in refused.value.text
        finally:
            client.close()
