from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tierd_layouts.safetensors_file import Entry, build_header
from tierd_tools import pack_flow
from tierd_tools.pack_flow import cost_bytes, limit_bytes
from tierd_tools.pack_plan import PlannedTensor
from tierd_tools.pack_tensor import BAND_BYTES, EncodedTensor
from tierd_tools.source_tensor import FileTensor

MIB = 1 << 20


def planned(name: str, nbytes: int, codec: str = "dense") -> PlannedTensor:
    shape = (nbytes // 128, 64)
    return PlannedTensor(FileTensor(name, "BF16", shape, Path("x"), 0, nbytes), codec, 0.0)


def test_a_matrix_costs_its_source_and_a_little_more_and_a_dense_tensor_its_source() -> None:
    assert cost_bytes(planned("a", 64 * MIB)) == 64 * MIB
    assert cost_bytes(planned("a", 64 * MIB, "lossless")) == 68 * MIB + BAND_BYTES


def test_the_limit_follows_the_two_largest_tensors() -> None:
    tensors = [planned(str(n), n * MIB) for n in (1, 7, 3, 5)]
    assert limit_bytes(tensors) == 12 * MIB + pack_flow.SLACK_BYTES // 2
    assert limit_bytes([]) == pack_flow.SLACK_BYTES // 2


class Watched:
    """Encodes nothing, slowly and out of order; knows what is under way at most."""

    def __init__(self, encoded_share: float) -> None:
        self.most = 0
        self._share = encoded_share
        self._now = 0
        self._lock = threading.Lock()

    def count(self, nbytes: int) -> None:
        with self._lock:
            self._now += nbytes
            self.most = max(self.most, self._now)

    def encode(self, tensor: PlannedTensor) -> EncodedTensor:
        self.count(cost_bytes(tensor))
        time.sleep(0.001 * (hash(tensor.source.name) % 5))
        nbytes = int(tensor.source.nbytes * self._share)
        self.count(nbytes - cost_bytes(tensor))
        arrays = {"data": [memoryview(bytes(nbytes))]}
        source = tensor.source
        return EncodedTensor(
            *(source.name, source.dtype, source.shape, "dense", 0, None, source.nbytes, "", arrays)
        )

    def run(self, tensors: list[PlannedTensor], *, ahead: int) -> list[str]:
        names = []
        with ThreadPoolExecutor(4) as pool:
            for encoded in pack_flow.encoded_in_order(pool, self.encode, tensors, ahead=ahead):
                names.append(encoded.name)
                assert encoded.nbytes
                self.count(-encoded.nbytes)
        return names


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_tensors_come_in_order_and_never_more_of_them_than_fit(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_flow, "SLACK_BYTES", 1 * MIB)
    sizes = [1, 1, 4, 1, 2, 1, 1, 3, 1, 1, 2, 4, 1, 1]
    tensors = [planned(str(i), size * MIB) for i, size in enumerate(sizes)]
    watched = Watched(share)
    assert watched.run(tensors, ahead=100) == [tensor.source.name for tensor in tensors]
    assert 4 * MIB < watched.most <= limit_bytes(tensors)


def test_a_tensor_above_the_limit_is_encoded_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_flow, "limit_bytes", lambda tensors: MIB)
    watched = Watched(0.5)
    tensors = [planned(str(i), 2 * MIB) for i in range(5)]
    assert watched.run(tensors, ahead=100) == list("01234")
    assert watched.most == 2 * MIB


def test_an_encoder_that_fails_ends_the_run_with_its_error() -> None:
    def encode(tensor: PlannedTensor) -> EncodedTensor:
        raise ValueError(tensor.source.name)

    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="0"):
        list(pack_flow.encoded_in_order(pool, encode, [planned("0", 1), planned("1", 1)], ahead=4))


# --------------------------------------------------------------------------------------------------
# The process

#: Prints the peak of resident memory above what the imports take, in bytes.
MEASURED = """
import json, sys
from tierd_tools import pack, pack_flow, wanda

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(field))

pack_flow.SLACK_BYTES = int(sys.argv[3])
before = status("VmRSS")
pack.pack(sys.argv[1], sys.argv[2], **json.loads(sys.argv[4]))
print(status("VmHWM") - before)
"""


def write_checkpoint(folder: Path, sizes: list[int]) -> None:
    """Matrices of normal numbers, `sizes` in MiB."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    block = rng.normal(0, 0.02, MIB // 2).astype(np.float32)
    data = (block.view(np.uint32) >> 16).astype("<u2").tobytes()
    entries: dict[str, Entry] = {}
    end = 0
    for i, size in enumerate(sizes):
        begin, end = end, end + size * MIB
        name = f"model.layers.{i // 4}.m{i % 4}.weight"
        entries[name] = Entry("BF16", (size * MIB // 4096, 2048), begin, end)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(build_header(entries, {"format": "pt"}))
        for _ in range(end // MIB):
            file.write(data)
    (folder / "config.json").write_text("{}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        # Many times the bound.
        ([48, 48, *[16] * 24], {"prune": "magnitude", "sparsity": 0.5}),
        # One that would not fit beside what it is encoded to.
        ([4, *[8] * 3, 192, 8], {}),
        ([4, *[8] * 3, 192, 8], {"codec": "int8", "prune": "magnitude", "sparsity": 0.5}),
    ],
)
def test_memory_stays_below_the_two_largest_tensors_and_the_slack(
    tmp_path: Path, sizes: list[int], settings: dict[str, Any]
) -> None:
    slack = 64 * MIB
    write_checkpoint(tmp_path / "m", sizes)
    arguments = [str(tmp_path / "m"), str(tmp_path / "p"), str(slack), json.dumps(settings)]
    command = [sys.executable, "-c", MEASURED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    largest, second = sorted(sizes)[:-3:-1]
    peak = int(done.stdout)
    assert peak < (largest + second) * MIB + slack
    assert peak > largest * MIB  # so it was measured at all
