"""Real daemons in their own processes, tiny packs for them, and a client that speaks raw frames."""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.daemon.shards import Shards, small_chunks
from tierd_layouts.container import LayerBuilder, write_index, write_shard
from tierd_layouts.index import PackIndex
from tierd_layouts.slot_table import SlotTable
from tierd_layouts.wire import MAX_FDS, MAX_REPLY_BYTES, PROTOCOL_VERSION, FrameDecoder, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from tierd.io.ssd import ReaderPool

MIB = 1 << 20
PATIENCE_S = 60.0  # how long anything that must happen may take, on a machine that is busy


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    """The first true value of `condition`. Fails the test when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    pytest.fail(f"not in {seconds} s: {what}")


@dataclass
class PackOnDisk:
    """A pack whose layer `i` holds one tensor of random bytes."""

    path: Path
    index: PackIndex
    content: list[bytes]  #: the bytes of each layer

    @property
    def name(self) -> str:
        return self.path.name

    def flip_byte(self, layer: int, at: int = 100) -> None:
        extent = self.index.layers[layer].extents[0]
        shard = self.path / self.index.shards[extent.shard].file
        with shard.open("r+b") as file:
            file.seek(extent.offset + at)
            byte = file.read(1)[0]
            file.seek(extent.offset + at)
            file.write(bytes([byte ^ 0xFF]))


def write_pack(path: Path, layers: int = 4, nbytes: int = 256 << 10, seed: int = 0) -> PackOnDisk:
    """nbytes: of each layer, a multiple of 4 KiB."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    encoded = []
    content = []
    for number in range(layers):
        data = rng.integers(0, 256, nbytes, dtype=np.uint8).tobytes()
        builder = LayerBuilder(f"model.layers.{number}")
        builder.add_dense(f"model.layers.{number}.weight", "BF16", (nbytes // 2,), data)
        encoded.append(builder.finish())
        content.append(data)
    shard, records = write_shard(path / "tierd-00001.safetensors", 0, encoded)
    (path / "config.json").write_text(json.dumps({"model_type": "tiny", "seed": seed}))
    index = PackIndex(
        version=1,
        tool="tests",
        source_digest="0" * 16,
        shards=(shard,),
        layers=tuple(records),
    )
    write_index(path, index)
    return PackOnDisk(path, index, content)


class Refused(Exception):
    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code, self.text = code, text


class RawClient:
    """Frames over a blocking socket, and nothing that it was not told to send."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(PATIENCE_S)
        try:
            self.sock.connect(path)
        except OSError:
            self.sock.close()
            raise
        self._decoder = FrameDecoder(MAX_REPLY_BYTES)
        self._replies: dict[int, dict[str, Any]] = {}
        self._fds: list[int] = []
        self._next_id = 1
        self._maps: list[tuple[mmap.mmap, SlotTable | None]] = []

    def send(self, op: str, **fields: Any) -> int:
        request = self._next_id
        self._next_id += 1
        self.sock.sendall(encode({"id": request, "op": op, **fields}))
        return request

    def receive(self, request: int) -> dict[str, Any]:
        """The reply to `request`, whatever comes before it. Raises Refused; EOFError."""
        while request not in self._replies:
            for reply in self._more():
                self._replies[reply["id"]] = reply
        reply = self._replies.pop(request)
        if not reply["ok"]:
            raise Refused(**reply["error"])
        return reply

    def _more(self) -> list[dict[str, Any]]:
        data, ancillary, flags, _ = self.sock.recvmsg(
            1 << 16, socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_CMSG_CLOEXEC
        )
        assert not flags & socket.MSG_CTRUNC
        for _, _, packed in ancillary:
            fds = array.array("i")
            fds.frombytes(packed)
            self._fds += fds
        if not data:
            raise EOFError
        self._decoder.feed(data)
        return list(self._decoder)

    def call(self, op: str, **fields: Any) -> dict[str, Any]:
        return self.receive(self.send(op, **fields))

    def refusal(self, op: str, **fields: Any) -> Refused:
        with pytest.raises(Refused) as caught:
            self.call(op, **fields)
        return caught.value

    def hello(self, held: tuple[int, ...] = (), **fields: Any) -> dict[str, Any]:
        return self.call(
            "hello", version=PROTOCOL_VERSION, client="test", capabilities=[], held=held, **fields
        )

    def open(self, model: str) -> OpenedModel:
        reply = self.call("open", model=model)
        fds, self._fds = self._fds, []
        chunk_bytes = reply["arena"].get("chunk_bytes")
        assert len(fds) == len(reply["files"]) + (2 if chunk_bytes is None else 1)
        files = {}
        for name, fd in zip(reply["files"], fds, strict=False):
            files[name] = os.pread(fd, 1 << 20, 0)
        memory = mmap.mmap(fds[-1], reply["table"]["bytes"], prot=mmap.PROT_READ)
        table = SlotTable(memory)
        self._maps.append((memory, table))
        opened: OpenedModel
        if chunk_bytes is None:
            arena = mmap.mmap(fds[-2], reply["arena"]["span_bytes"], prot=mmap.PROT_READ)
            self._maps.append((arena, None))
            opened = OpenedModel(self, reply["model_id"], files, arena, table)
        else:
            opened = OpenedOnGpu(
                self, reply["model_id"], files, None, table,
                number=reply["arena"]["arena"], chunk_bytes=chunk_bytes,
            )  # fmt: skip
        for fd in fds:
            os.close(fd)
        return opened

    def keep(self, memory: mmap.mmap) -> None:
        """Unmap it with the connection, if not before."""
        self._maps.append((memory, None))

    def take_fds(self) -> list[int]:
        """The descriptors that came; the caller closes them."""
        fds, self._fds = self._fds, []
        return fds

    def close(self) -> None:
        self.sock.close()
        for memory, table in self._maps:
            if table is not None:
                table.close()
            memory.close()
        self._maps = []
        for fd in self._fds:
            os.close(fd)
        self._fds = []


@dataclass
class OpenedModel:
    client: RawClient
    model_id: int
    files: dict[str, bytes]
    arena: mmap.mmap | None
    table: SlotTable

    def acquire(self, layer: int, **fields: Any) -> dict[str, Any]:
        return self.client.call("acquire", model_id=self.model_id, layer=layer, **fields)

    def bytes_of(self, lease: dict[str, Any]) -> bytes:
        assert self.arena is not None
        return self.arena[lease["offset"] : lease["offset"] + lease["bytes"]]

    def plan(self, order: list[int], **fields: Any) -> dict[str, Any]:
        return self.client.call("plan", model_id=self.model_id, order=order, **fields)

    def release(self, *leases: dict[str, Any]) -> None:
        self.client.call("release", leases=[lease["lease"] for lease in leases])


@dataclass
class OpenedOnGpu(OpenedModel):
    """A model on a GPU that is a memfd for each chunk. `chunks`: those that it has, mapped."""

    number: int = 0  #: of the arena
    chunk_bytes: int = 0
    chunks: dict[int, mmap.mmap] = field(default_factory=dict)

    def chunks_of(self, lease: dict[str, Any]) -> list[int]:
        end = lease["offset"] + lease["bytes"]
        return list(range(lease["offset"] // self.chunk_bytes, -(-end // self.chunk_bytes)))

    def map(self, numbers: list[int]) -> None:
        self.client.call("chunks", arena=self.number, chunks=numbers)
        fds = self.client.take_fds()
        assert len(fds) == len(numbers)
        for number, fd in zip(numbers, fds, strict=True):
            self.chunks[number] = mmap.mmap(fd, self.chunk_bytes, prot=mmap.PROT_READ)
            self.client.keep(self.chunks[number])
            os.close(fd)

    def bytes_of(self, lease: dict[str, Any]) -> bytes:
        numbers = self.chunks_of(lease)
        missing = [number for number in numbers if number not in self.chunks]
        if missing:
            self.map(missing)
        first = numbers[0] * self.chunk_bytes
        content = b"".join(self.chunks[number][:] for number in numbers)
        return content[lease["offset"] - first :][: lease["bytes"]]

    def attend(self, **fields: Any) -> dict[str, Any]:
        return self.client.call("attend", **{"unmapped": [], "scratch_bytes": 0, **fields})

    def unmap(self, numbers: list[int]) -> dict[str, Any]:
        """Unmap these, and say so."""
        for number in numbers:
            self.chunks.pop(number).close()
        return self.attend(unmapped=[[self.number, numbers]])

    def obey(self) -> list[int]:
        """Unmap what is to be unmapped; returns what that was."""
        asked = self.attend()["unmap"]
        numbers = [number for _, numbers in asked for number in numbers]
        if numbers:
            assert [arena for arena, _ in asked] == [self.number]
            assert self.unmap(numbers)["unmap"] == []
        return numbers


class RunningDaemon:
    """`python -m tierd` in a process of its own."""

    def __init__(
        self,
        socket_path: str,
        log: Path,
        arguments: list[str],
        environ: Mapping[str, str] | None = None,
        descriptors: Mapping[str, int] | None = None,
        program: tuple[str, ...] = ("-m", "tierd"),
    ) -> None:
        """descriptors: passed as systemd does, by name. program: what Python runs."""
        self.socket = socket_path
        self.log = log
        command = [sys.executable, *program, "--socket", socket_path, *arguments]
        names = list(descriptors or {})
        environment = {**os.environ, **(environ or {})}
        if names:
            environment |= {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
            command = [sys.executable, "-c", _LIKE_SYSTEMD, *command]
        with log.open("ab") as output:
            self.started_at = time.monotonic()
            with _descriptors_from_3(list((descriptors or {}).values())) as passed:
                self.process = subprocess.Popen(
                    command,
                    stdout=output,
                    stderr=output,
                    env=environment,
                    pass_fds=passed,
                )

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait_ready(self) -> RunningDaemon:
        def answers() -> bool:
            if self.process.poll() is not None:
                pytest.fail(f"tierd ended with {self.process.returncode}:\n{self.log_text()}")
            try:
                self.status()
            except OSError:
                return False
            return True

        wait_until(answers, "the daemon answers")
        return self

    def log_text(self) -> str:
        return self.log.read_text()

    def status(self) -> dict[str, Any]:
        return self.ask("status")

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        client = RawClient(self.socket)
        try:
            return client.call(op, **fields)
        finally:
            client.close()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)


# What systemd does between fork and exec: LISTEN_PID is the pid of the service itself.
_LIKE_SYSTEMD = """
import os, sys
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[1], sys.argv[1:])
"""


@contextlib.contextmanager
def _descriptors_from_3(fds: list[int]) -> Iterator[tuple[int, ...]]:
    """Have the descriptors at 3, 4, ... while a child is started; what was there comes back."""
    targets = range(3, 3 + len(fds))
    moved = [os.dup(fd) for fd in fds]
    high = [_above(fd, 200) for fd in moved]
    saved = {}
    for target in targets:
        with contextlib.suppress(OSError):
            saved[target] = _above(os.dup(target), 300)
    for fd, target in zip(high, targets, strict=True):
        os.dup2(fd, target, inheritable=True)
        os.close(fd)
    try:
        yield tuple(targets)
    finally:
        for target in targets:
            if target in saved:
                os.dup2(saved[target], target, inheritable=False)
                os.close(saved[target])
            else:
                os.close(target)


def _above(fd: int, lowest: int) -> int:
    high = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)
    os.close(fd)
    return high


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A directory of packs, empty."""
    directory = tmp_path / "models"
    directory.mkdir()
    return directory


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., RunningDaemon]]:
    """Starts daemons; kills those that the test leaves running."""
    daemons: list[RunningDaemon] = []

    def start(*arguments: str | Path, wait: bool = True, **options: Any) -> RunningDaemon:
        path = options.pop("socket", str(tmp_path / "tierd.sock"))
        log = tmp_path / f"tierd-{len(daemons)}.log"
        daemon = RunningDaemon(path, log, [str(argument) for argument in arguments], **options)
        daemons.append(daemon)
        return daemon.wait_ready() if wait else daemon

    yield start
    for daemon in daemons:
        if daemon.process.poll() is None:
            daemon.kill()


@pytest.fixture
def connect() -> Iterator[Callable[..., RawClient]]:
    """Connects clients; closes them at the end."""
    clients: list[RawClient] = []

    def connect_to(
        daemon: RunningDaemon, *, greet: bool = True, tier: str | None = None
    ) -> RawClient:
        client = RawClient(daemon.socket)
        clients.append(client)
        if greet:
            fields: dict[str, Any] = {} if tier is None else {"tier": tier}
            client.hello(**fields)
        return client

    yield connect_to
    for client in clients:
        client.close()


@pytest.fixture
def shards(tmp_path: Path) -> Iterator[Shards]:
    made = Shards(tmp_path)
    yield made
    made.close()  # a target that something still holds would be a BufferError here


@pytest.fixture
def pool() -> Iterator[ReaderPool]:
    """Four readers, which verify every block by itself."""
    made = small_chunks(4)
    yield made
    made.close()
