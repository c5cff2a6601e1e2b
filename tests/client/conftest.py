"""A daemon small enough to be told what to do wrong, and tiny packs for it and for the real one."""

from __future__ import annotations

import array
import contextlib
import fcntl
import itertools
import mmap
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tierd_layouts import exponent_packed, packed_matrix, quantised
from tierd_layouts.container import LayerBuilder, write_index, write_shard
from tierd_layouts.index import PackIndex
from tierd_layouts.slot_entries import SlotState, table_bytes
from tierd_layouts.slot_table import SlotTable
from tierd_layouts.wire import MAX_REQUEST_BYTES, FrameDecoder, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MODEL = "tiny"
SLOT_BYTES = CHUNK_BYTES = 2 << 20
F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2
_epochs = itertools.count(4711)
FILES = ("config.json", "tierd.json")
#: Matrices of layer `odd` in the other codecs: name -> codec, dtype, masked. Edge tiles everywhere.
CODED = {
    "odd.exponent": ("exponent-packed", "BF16", True),
    "odd.exponent.dense": ("exponent-packed", "BF16", False),
    "odd.exponent.half": ("exponent-packed", "F16", True),
    "odd.exponent.single": ("exponent-packed", "F32", False),
    "odd.int8": ("int8", "BF16", True),
    "odd.int8.dense": ("int8", "F32", False),
    "odd.int4": ("int4", "BF16", True),
    "odd.int4.dense": ("int4", "F16", False),
}


@dataclass
class TinyPack:
    """A pack on disk and, by tensor name, the bits that come out of it; of a lossy codec also the
    weights before their rounding to the dtype."""

    folder: Path
    index: PackIndex
    bits: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    unrounded: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def layer_bytes(self, number: int) -> bytes:
        (extent,) = self.index.layers[number].extents
        shard = self.folder / self.index.shards[extent.shard].file
        with shard.open("rb") as file:
            file.seek(extent.offset)
            return file.read(extent.nbytes)


def sparse_bits(
    rng: np.random.Generator, shape: tuple[int, int], dtype: str
) -> np.ndarray[Any, Any]:
    """Raw bits of finite weights, half of them zero."""
    values = rng.standard_normal(shape).astype(np.float32)
    values[rng.random(shape) < 0.5] = 0
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def build_pack(folder: Path) -> TinyPack:
    """Four layers: `embed` dense, `blocks.0` and `blocks.1` packed and dense, `odd` one of each
    dtype and codec."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    bits: dict[str, np.ndarray[Any, Any]] = {}
    unrounded: dict[str, np.ndarray[Any, Any]] = {}
    layers = []

    def raw(builder: LayerBuilder, name: str, shape: tuple[int, int], dtype: str) -> None:
        bits[name] = sparse_bits(rng, shape, dtype)
        builder.add_raw(name, dtype, bits[name])

    def dense(builder: LayerBuilder, name: str, shape: tuple[int, ...]) -> None:
        size = (int(np.prod(shape)), 1)
        bits[name] = sparse_bits(rng, size, "BF16").reshape(shape)
        builder.add_dense(name, "BF16", shape, bits[name].data)

    builder = LayerBuilder("embed")
    dense(builder, "embed.weight", (50, 100))
    layers.append(builder.finish())
    for number in range(2):
        builder = LayerBuilder(f"blocks.{number}")
        raw(builder, f"blocks.{number}.up.weight", (130, 100), "BF16")
        raw(builder, f"blocks.{number}.down.weight", (100, 130), "BF16")
        dense(builder, f"blocks.{number}.norm.weight", (100,))
        layers.append(builder.finish())
    builder = LayerBuilder("odd")
    raw(builder, "odd.half", (65, 70), "F16")
    raw(builder, "odd.single", (64, 128), "F32")
    raw(builder, "odd.bfloat", (1, 3), "BF16")
    dense(builder, "odd.nothing", (0, 4))
    for name, (codec, dtype, masked) in CODED.items():
        source = sparse_bits(rng, (130, 200), dtype)
        if codec == exponent_packed.CODEC:
            matrix = exponent_packed.encode(source, dtype, masked=masked)
        else:
            matrix = quantised.encode(source, dtype, codec=codec, group=128, masked=masked)
            unrounded[name] = quantised.weights(matrix)
        bits[name] = packed_matrix.decode(matrix)
        builder.add_matrix(name, matrix)
    layers.append(builder.finish())
    shard, records = write_shard(folder / "tierd-00001.safetensors", 0, layers)
    index = PackIndex(
        version=1,
        tool="tests",
        source_digest="0" * 16,
        shards=(shard,),
        layers=tuple(records),
        aliases={"head.weight": "embed.weight"},
    )
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    write_index(folder, index)
    return TinyPack(folder, index, bits, unrounded)


class FakeDaemon:
    """Speaks the protocol over a real socket and shares real memory; never evicts.

    Layer i lies in slot i, at `offsets[i]`. Everything else is as the attributes say. With a
    `device` it has a tier gpu:0, whose arena comes in chunks of CHUNK_BYTES.
    """

    def __init__(self, path: Path, pack: TinyPack) -> None:
        self.path = str(path)
        self.pack = pack
        self.epoch = next(_epochs)  # mappings are shared by epoch
        self.version = 1
        self.slot_bytes = SLOT_BYTES
        self.capabilities = ["x"]
        self.device: dict[str, Any] | None = None
        self.offsets = [number * SLOT_BYTES for number in range(len(pack.index.layers))]
        self.handle: bytes | None = None  # given in place of chunks
        self.unmap: list[int] = []  # chunks to ask back
        self.chunks_given: list[int] = []
        self.requests: list[dict[str, Any]] = []
        self.leases: dict[int, int] = {}  # lease -> layer
        self.later: set[int] = set()  # layers that are not granted ahead
        self.refusals: dict[str, tuple[str, str]] = {}  # op -> code, text
        self.grant: dict[str, Any] = {}  # fields that overwrite a grant's
        self.may_grant = threading.Event()  # cleared: acquires wait
        self.may_grant.set()
        self.answers: Callable[[dict[str, Any]], list[bytes] | None] | None = None
        self.span = SLOT_BYTES * len(pack.index.layers)
        self.arena_fd = _memfd("arena", self.span)
        self.table_fd = _memfd("table", table_bytes(16, 64))
        self.write_layers()
        self.table = SlotTable.create(
            mmap.mmap(self.table_fd, table_bytes(16, 64)),
            slot_count=16,
            lease_count=64,
            epoch=self.epoch,
        )
        self.set_generations(1)
        self._next_lease = 100
        self._peers: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def write_layers(self) -> None:
        """Fill the arena, at `offsets`."""
        for number, offset in enumerate(self.offsets):
            os.pwrite(self.arena_fd, self.pack.layer_bytes(number), offset)

    def set_generations(self, base: int) -> None:
        """Slot i gets generation base + i."""
        for number, layer in enumerate(self.pack.index.layers):
            self.table.set_slot(
                number,
                generation=base + number,
                arena=3,
                offset=self.offsets[number],
                nbytes=layer.nbytes,
                state=SlotState.RESIDENT,
                key=bytes(16),
            )

    def chunk_fd(self, chunk: int) -> int:
        """A new file with what the arena has in that chunk."""
        fd = _memfd(f"chunk-{chunk}", CHUNK_BYTES)
        os.pwrite(fd, os.pread(self.arena_fd, CHUNK_BYTES, chunk * CHUNK_BYTES), 0)
        return fd

    def stop(self) -> None:
        """End like a killed process: every socket closes, what was shared stays mapped."""
        for sock in (self._listener, *self._peers):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self.may_grant.set()  # whoever waits finds the sockets closed

    def close(self) -> None:
        self.stop()
        os.close(self.arena_fd)
        os.close(self.table_fd)

    def asked(self, op: str) -> list[dict[str, Any]]:
        """The requests of one kind so far."""
        return [request for request in self.requests if request["op"] == op]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Releases want no reply: give them a moment."""
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "the daemon never saw what it should"
            time.sleep(0.002)

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._peers.append(peer)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        decoder = FrameDecoder(MAX_REQUEST_BYTES)
        lock = threading.Lock()
        held: list[int] = []
        try:
            while data := peer.recv(65536):
                decoder.feed(data)
                for message in decoder:
                    self.requests.append(message)
                    if message["op"] == "acquire" and not self.may_grant.is_set():
                        arguments = (peer, lock, message, held)
                        threading.Thread(
                            target=self._answer_when_allowed, args=arguments, daemon=True
                        ).start()
                    else:
                        self._answer(peer, lock, message, held)
        except OSError:
            pass
        for lease in held:
            self.leases.pop(lease, None)

    def _answer_when_allowed(self, *arguments: Any) -> None:
        self.may_grant.wait()
        with contextlib.suppress(OSError):
            self._answer(*arguments)

    def _answer(
        self, peer: socket.socket, lock: Any, message: dict[str, Any], held: list[int]
    ) -> None:
        if self.answers is not None and (frames := self.answers(message)) is not None:
            for frame in frames:
                peer.sendall(frame)
            return
        op, request = message["op"], message["id"]
        fields: dict[str, Any] = {}
        fds: list[int] = []
        if op in self.refusals:
            code, text = self.refusals[op]
            error = {"code": code, "text": text}
            with lock:
                peer.sendall(encode({"id": request, "ok": False, "error": error}))
            return
        if op == "hello":
            fields = {
                "version": self.version,
                "capabilities": self.capabilities,
                "pid": os.getpid(),
            }
            fields |= {"daemon_version": "fake", "epoch": self.epoch}
            if self.device is not None:
                fields |= {"tier": message.get("tier", "dram")}
                fields |= {"device": self.device} if "tier" in message else {}
        elif op == "open":
            fields = {"model_id": 9, "files": list(FILES)}
            fields |= {"arena": {"arena": 3, "span_bytes": self.span}}
            fields |= {"table": {"bytes": table_bytes(16, 64)}}
            fds = [os.open(self.pack.folder / name, os.O_RDONLY) for name in FILES]
            shared = [self.arena_fd, self.table_fd]
            if self.device is not None:
                kind = {"kind": self.device["kind"], "chunk_bytes": CHUNK_BYTES}
                fields["arena"] |= kind
                shared = [self.table_fd]
            for fd in shared:
                fds.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
        elif op == "chunks":
            self.chunks_given += message["chunks"]
            if self.handle is not None:
                fields = {"handle": self.handle, "nbytes": self.span}
            else:
                fds = [self.chunk_fd(chunk) for chunk in message["chunks"]]
        elif op == "attend":
            for _, chunks in message["unmapped"]:
                self.unmap = [chunk for chunk in self.unmap if chunk not in chunks]
            fields = {"pressed": self.table.pressed}
            fields |= {"unmap": [[3, self.unmap]] if self.unmap else []}
        elif op == "plan":
            fields = {"minimum_bytes": 12345}
        elif op == "acquire":
            layer = message["layer"]
            if message["ahead"] and layer in self.later:
                fields = {"later": True}
            else:
                lease, self._next_lease = self._next_lease, self._next_lease + 1
                self.leases[lease] = layer
                held.append(lease)
                fields = {"lease": lease, "slot": layer, "waited_ns": 0, "arena": 3}
                fields |= {"generation": self.table.generation(layer)}
                fields |= {"offset": self.offsets[layer]}
                fields |= {"bytes": self.pack.index.layers[layer].nbytes, **self.grant}
        elif op in ("release", "hint"):
            for lease in message.get("leases", ()):
                self.leases.pop(lease, None)
            return
        frame = encode({"id": request, "ok": True, **fields})
        with lock:
            if fds:
                rights = array.array("i", fds)
                peer.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            else:
                peer.sendall(frame)
        for fd in fds:
            os.close(fd)


def _memfd(name: str, nbytes: int) -> int:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    return fd


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> TinyPack:
    return build_pack(tmp_path_factory.mktemp("packs") / MODEL)


@pytest.fixture
def gpu_daemon(daemon: FakeDaemon) -> FakeDaemon:
    """One with a tier gpu:0, a GPU that the host plays. Layer 1 lies in two chunks."""
    daemon.capabilities = ["gpu"]
    daemon.device = {"kind": "memfd", "number": 0, "uuid": ""}
    daemon.table.pressed = True
    daemon.offsets[1] = 2 * CHUNK_BYTES - 4096
    daemon.offsets[2] = 2 * CHUNK_BYTES + 4096 * 64
    daemon.write_layers()
    daemon.set_generations(1)
    return daemon


@pytest.fixture
def daemon(tmp_path: Path, pack: TinyPack) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(tmp_path / "fake.sock", pack)
    yield fake
    fake.close()
