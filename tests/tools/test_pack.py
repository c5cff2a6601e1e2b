from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd_layouts.container import open_pack, read_layer, tensor_bits
from tierd_tools import pack as pack_module
from tierd_tools import pack_plan
from tierd_tools.checkpoint import Checkpoint
from tierd_tools.errors import (
    BadSetting,
    CheckpointError,
    CheckpointMissing,
    DiskFull,
    PackError,
    TargetBusy,
    TargetRefused,
    TargetUnwritable,
)
from tierd_tools.pack import pack
from tierd_tools.pack_settings import Settings
from tierd_tools.pack_shard import ShardWriter
from tierd_tools.pack_staging import Staging
from tierd_tools.prune import is_pruned, magnitude
from tierd_tools.source_tensor import FileTensor
from tierd_tools.unpack import unpack
from tierd_tools.verify import verify

if TYPE_CHECKING:
    from pathlib import Path

ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1, "BOOL": 1}
#: raw patterns that a float comparison would lose: zeros of both signs, NaN payloads, infinity
SPECIAL = {
    2: [0, 0x8000, 0x7FC1, 0xFFFF, 0x7F80, 0x7C01, 0x0001],
    4: [0, 0x80000000, 0x7FC00001, 0xFFFFFFFF, 0x7F800000, 1],
}


@st.composite
def weights(draw: st.DrawFn) -> tuple[str, tuple[int, ...], bytes]:
    dtype = draw(st.sampled_from(["BF16", "F16", "F32", "F64", "I64", "U8"]))
    sizes = st.sampled_from([0, 1, 2, 63, 64, 65, 130])
    shape = tuple(draw(st.lists(sizes, max_size=3)))
    if math.prod(shape) > 20_000:
        shape = shape[:2]
    item = ITEM_BYTES[dtype]
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    data = rng.integers(0, 256, math.prod(shape) * item, np.uint8)
    if item in SPECIAL:
        bits = data.view(f"<u{item}")
        zeros = draw(st.sampled_from([0.0, 0.1, 0.5, 0.97, 1.0]))
        bits[rng.random(bits.size) < 0.05] = rng.choice(SPECIAL[item])
        bits[rng.random(bits.size) < zeros] = 0
    return dtype, shape, data.tobytes()


NAMES = st.sampled_from(
    [
        *("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "alone"),
        *(f"model.layers.{i}.{n}" for i in (0, 1, 10) for n in ("a.weight", "b.bias", "c")),
    ]
)


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.dictionaries(NAMES, weights(), min_size=1, max_size=6),
    tied=st.booleans(),
    shards=st.integers(1, 3),
    codec=st.sampled_from(["lossless", "raw"]),
)
def test_unpacking_a_pack_gives_back_every_byte(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: Any,
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]],
    tied: bool,
    shards: int,
    codec: str,
) -> None:
    tmp_path = tmp_path_factory.mktemp("roundtrip")
    if tied and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    source = checkpoints.write(tmp_path / "source", tensors, shards=min(shards, len(tensors)))
    pack(source, tmp_path / "pack", codec=codec)
    verify(tmp_path / "pack")
    unpack(tmp_path / "pack", tmp_path / "out")
    assert checkpoints.read(tmp_path / "out") == tensors


@settings(max_examples=20, deadline=None)
@given(
    tensors=st.dictionaries(NAMES, weights(), min_size=1, max_size=5),
    sparsity=st.floats(0, 1, exclude_max=True),
)
def test_unpacking_a_pruned_pack_gives_back_the_pruned_bytes(
    tmp_path_factory: pytest.TempPathFactory,
    checkpoints: Any,
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]],
    sparsity: float,
) -> None:
    tmp_path = tmp_path_factory.mktemp("roundtrip")
    tensors["model.layers.7.up.weight"] = ("BF16", (65, 3), bytes(range(195)) * 2)
    source = checkpoints.write(tmp_path / "source", tensors)
    pack(source, tmp_path / "pack", prune="magnitude", sparsity=sparsity)
    unpack(tmp_path / "pack", tmp_path / "out")
    assert checkpoints.read(tmp_path / "out") == pruned(source, tensors, sparsity)


def pruned(source: Path, tensors: Any, sparsity: float) -> Any:
    expected = dict(tensors)
    for name, tensor in Checkpoint.open(source).tensors.items():
        if pack_plan.is_prunable(tensor):
            bits = tensor.read_bits()
            if not is_pruned(bits, sparsity):
                bits = magnitude(bits, tensor.dtype, sparsity)
            expected[name] = (tensor.dtype, tensor.shape, bits.tobytes())
    return expected


def test_a_tied_weight_is_stored_once_and_found_under_both_names(
    tmp_path: Path, checkpoints: Any
) -> None:
    tensors = checkpoints.llama()
    report = pack(checkpoints.write(tmp_path / "m", tensors), tmp_path / "p")
    assert report.aliases == 1
    index = open_pack(tmp_path / "p")
    layer, tensor = index.tensor("lm_head.weight")
    assert tensor.name == "model.embed_tokens.weight"
    bits = tensor_bits(read_layer(tmp_path / "p", index, layer), tensor)
    assert bits.tobytes() == tensors["lm_head.weight"][2]


def test_a_matrix_is_stored_sparse_exactly_when_that_is_smaller(
    tmp_path: Path, checkpoints: Any
) -> None:
    tensors = {}
    for percent in (0, 3, 10, 50, 100):
        bits = np.ones(128 * 128, "<u2")
        bits[: bits.size * percent // 100] = 0
        tensors[f"l.{percent}.w"] = ("BF16", (128, 128), bits.tobytes())
    pack(checkpoints.write(tmp_path / "m", tensors), tmp_path / "p", codec="raw")
    index = open_pack(tmp_path / "p")
    codecs = {tensor.name: tensor.codec for layer in index.layers for tensor in layer.tensors}
    assert codecs == {
        **{"l.0.w": "dense", "l.3.w": "dense"},  # the bitmap takes 6.25 %
        **{"l.10.w": "raw", "l.50.w": "raw", "l.100.w": "raw"},
    }
    for layer in index.layers:
        for tensor in layer.tensors:
            assert sum(a.nbytes for a in tensor.arrays.values()) <= tensor.dense_bytes


def test_the_index_names_tool_settings_and_content(tmp_path: Path, checkpoints: Any) -> None:
    tensors = checkpoints.llama()
    one = checkpoints.write(tmp_path / "one", tensors, metadata={"format": "pt", "by": "me"})
    three = checkpoints.write(tmp_path / "three", tensors, shards=3)
    pack(one, tmp_path / "p1", prune="magnitude", sparsity=0.25)
    pack(three, tmp_path / "p3")
    first, third = open_pack(tmp_path / "p1"), open_pack(tmp_path / "p3")
    assert "--prune magnitude --sparsity 0.25" in first.tool
    assert first.metadata == {"format": "pt", "by": "me"}
    assert first.source_digest == third.source_digest  # of the content, not of the files
    tensors["model.norm.weight"] = ("BF16", (128,), bytes(256))
    pack(checkpoints.write(tmp_path / "other", tensors), tmp_path / "p4")
    assert open_pack(tmp_path / "p4").source_digest != first.source_digest


def test_a_pack_holds_control_files_shards_and_index_and_leaves_nothing_beside(
    tmp_path: Path, checkpoints: Any
) -> None:
    report = pack(checkpoints.write(tmp_path / "m", checkpoints.llama()), tmp_path / "packs" / "p")
    assert sorted(file.name for file in (tmp_path / "packs" / "p").iterdir()) == [
        *("config.json", "tierd-00001.safetensors", "tierd.json", "tokenizer.json"),
    ]
    assert [file.name for file in (tmp_path / "packs").iterdir()] == ["p"]
    assert report.pack_dir in report.summary()


def test_shards_open_with_the_safetensors_library(tmp_path: Path, checkpoints: Any) -> None:
    from safetensors import safe_open

    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    pack(source, tmp_path / "p", prune="magnitude", sparsity=0.5)
    with safe_open(tmp_path / "p" / "tierd-00001.safetensors", "np") as file:
        bitmap = file.get_tensor("model.layers.0.mlp.up_proj.weight.bitmap")
        offsets = file.get_tensor("model.layers.0.mlp.up_proj.weight.offsets")
    assert int(np.bitwise_count(bitmap).sum()) == 384 * 128 // 2
    assert offsets.size == 6 * 2 + 1


def weights_of(pack_dir: Path) -> dict[str, Any]:
    """{tensor: (index's record, bits)}."""
    index = open_pack(pack_dir)
    found: dict[str, Any] = {}
    for layer in index.layers:
        data = read_layer(pack_dir, index, layer)
        found |= {tensor.name: (tensor, tensor_bits(data, tensor)) for tensor in layer.tensors}
    return found


def test_each_matrix_gets_the_sparsity_that_its_name_says(tmp_path: Path, checkpoints: Any) -> None:
    tensors = checkpoints.llama()
    gate = "model.layers.1.mlp.gate.weight"
    tensors[gate] = tensors["model.layers.1.self_attn.q_proj.weight"]
    report = pack(
        checkpoints.write(tmp_path / "m", tensors),
        tmp_path / "p",
        prune="magnitude",
        sparsity=0.5,
        sparsity_of=["model.layers.0=0.25", "*.down_proj=0.75"],
        keep=["*.k_proj", "model.layers.2.mlp"],
    )
    for name, (_, bits) in weights_of(tmp_path / "p").items():
        kept = name == gate or "k_proj" in name or "layers.2.mlp" in name
        if kept or "norm" in name or not name.startswith("model.layers"):
            expected = 0.0
        elif "down_proj" in name:
            expected = 0.75
        else:
            expected = 0.25 if "layers.0" in name else 0.5
        assert (bits == 0).mean() == pytest.approx(expected, abs=0.001), name
    assert report.pruned_tensors == 15 - 5
    assert "--sparsity-of '*.down_proj=0.75'" in open_pack(tmp_path / "p").tool


def test_quantised_are_the_linear_weights_that_are_not_to_be_kept(
    tmp_path: Path, checkpoints: Any
) -> None:
    tensors = checkpoints.llama()
    gate = "model.layers.1.mlp.gate.weight"
    tensors[gate] = tensors["model.layers.1.self_attn.q_proj.weight"]
    broken = "model.layers.1.mlp.up_proj.weight"
    dtype, shape, data = tensors[broken]
    tensors[broken] = (dtype, shape, data[:-2] + b"\x80\x7f")  # infinity
    source = checkpoints.write(tmp_path / "m", tensors)
    report = pack(source, tmp_path / "p", codec="int8", group=64, keep=["*.o_proj"])
    assert report.codecs == {"dense": 5, "exponent-packed": 5, "int8": 11}
    assert report.not_finite_tensors == [broken]
    assert f"not finite, stored without loss instead: {broken}" in report.summary()
    for name, (tensor, bits) in weights_of(tmp_path / "p").items():
        lossless = "o_proj" in name or name in (gate, broken) or len(tensor.shape) == 1
        if lossless or not name.startswith("model.layers"):
            assert bits.tobytes() == tensors[name][2], name
            assert tensor.group is None
        else:
            assert tensor.codec == "int8"
            assert tensor.group == 64
    verify(tmp_path / "p")


def test_a_checkpoint_that_is_pruned_already_is_left_as_it_is_and_said_so(
    tmp_path: Path, checkpoints: Any
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    pack(source, tmp_path / "half", prune="magnitude", sparsity=0.5)
    unpack(tmp_path / "half", tmp_path / "pruned")
    report = pack(tmp_path / "pruned", tmp_path / "p", prune="magnitude", sparsity=0.505)
    assert report.pruned_tensors == 0
    assert len(report.left_tensors) == 15
    assert "left as they are, pruned already: 15 tensors: " in report.summary()
    unpack(tmp_path / "p", tmp_path / "out")
    assert checkpoints.read(tmp_path / "out") == checkpoints.read(tmp_path / "pruned")
    report = pack(tmp_path / "pruned", tmp_path / "p", prune="magnitude", sparsity=0.6)
    assert (report.pruned_tensors, report.left_tensors) == (15, [])


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


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"keep": ["model.layers.7"]}, r"keep 'model\.layers\.7' matches none of the 21 tensors"),
        (
            {"prune": "magnitude", "sparsity_of": ["lm_head=0.5"]},
            "sparsity-of 'lm_head' matches none of the 15 linear weights",
        ),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(
    tmp_path: Path, checkpoints: Any, settings: Any, text: str
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    with pytest.raises(BadSetting, match=text):
        pack(source, tmp_path / "p", **settings)
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


def test_a_tensor_named_like_a_part_of_another_is_refused_before_anything_is_written(
    tmp_path: Path, checkpoints: Any
) -> None:
    tensors = checkpoints.llama(layers=1)
    tensors["model.layers.0.mlp.up_proj.weight.heads"] = ("U8", (4,), b"1234")
    source = checkpoints.write(tmp_path / "m", tensors)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\.heads' has the name that a pack"):
        pack(source, tmp_path / "p")
    assert [file.name for file in tmp_path.iterdir()] == ["m"]


# --------------------------------------------------------------------------------------------------
# Settings and targets


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"sparsity": 0.5}, "without --prune"),
        ({"sparsity_of": ["*=0.5"]}, "without --prune"),
        ({"prune": "magnitude"}, "needs a sparsity"),
        ({"prune": "magnitude", "sparsity": 1.0}, r"1\.0 is outside"),
        ({"prune": "magnitude", "sparsity": -0.1}, r"-0\.1 is outside"),
        ({"prune": "magnitude", "sparsity": math.nan}, "nan is outside"),
        ({"prune": "magnitude", "sparsity": math.inf}, "inf is outside"),
        ({"prune": "random", "sparsity": 0.5}, "'random' is unknown: none, magnitude, wanda"),
        ({"prune": "wanda", "sparsity": 0.5}, "wanda needs a calibration text"),
        ({"codec": "int3"}, "'int3' is unknown: lossless, raw, int8, int4"),
        ({"codec": "int4", "group": 96}, "96 is not a positive multiple of 64"),
        ({"group": 128}, "128 has no effect with codec lossless"),
        ({"prune": "magnitude", "sparsity_of": ["a"]}, "'a' is not PATTERN=S"),
        ({"keep": [""]}, "'' is no pattern"),
        ({"calibration": "text"}, "text without --prune wanda"),
        ({"calibration_windows": 4}, "4 without --prune wanda"),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_read(
    tmp_path: Path, wrong: dict[str, Any], text: str
) -> None:
    with pytest.raises(BadSetting, match=text):
        pack(tmp_path / "nowhere", tmp_path / "p", **wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".hidden", "with space", "a..b", "-x", "é"])
def test_a_pack_that_no_daemon_would_serve_is_refused_by_its_name(
    tmp_path: Path, checkpoints: Any, name: str
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    with pytest.raises(BadSetting, match="model name"):
        pack(source, tmp_path / name)


def test_a_missing_model_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match="does not exist"):
        pack(tmp_path / "nowhere", tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_pruning_a_model_without_numbered_layers_is_refused(
    tmp_path: Path, checkpoints: Any
) -> None:
    source = checkpoints.write(tmp_path / "m", {"lm_head.weight": ("F32", (1, 1), bytes(4))})
    with pytest.raises(PackError, match="nothing to prune"):
        pack(source, tmp_path / "p", prune="magnitude", sparsity=0.5)


def test_an_existing_pack_is_replaced_and_keeps_its_access_mode(
    tmp_path: Path, checkpoints: Any
) -> None:
    tensors = checkpoints.llama()
    source = checkpoints.write(tmp_path / "m", tensors)
    assert not pack(source, tmp_path / "p").replaced
    (tmp_path / "p" / "tierd.json").chmod(0o640)
    (tmp_path / "p").chmod(0o750)
    report = pack(source, tmp_path / "p", prune="magnitude", sparsity=0.5)
    assert report.replaced
    assert report.zero_share == pytest.approx(0.5, abs=0.01)
    verify(tmp_path / "p")
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o750
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "p").iterdir()} == {0o640}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "p"]


def test_a_target_that_is_no_pack_is_refused_and_untouched(
    tmp_path: Path, checkpoints: Any
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.tex").write_text("precious")
    with pytest.raises(TargetRefused, match="is not a pack"):
        pack(source, tmp_path / "p")
    with pytest.raises(TargetRefused, match="is not a pack"):
        pack(source, source)
    (tmp_path / "f").touch()
    with pytest.raises(TargetRefused, match="not a directory"):
        pack(source, tmp_path / "f")
    assert (tmp_path / "p" / "thesis.tex").read_text() == "precious"


def test_a_pack_with_somebodys_folder_in_it_is_not_replaced(
    tmp_path: Path, checkpoints: Any
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    pack(source, tmp_path / "p")
    (tmp_path / "p" / "notes").mkdir()
    with pytest.raises(TargetRefused, match="notes"):
        pack(source, tmp_path / "p")


def test_an_empty_directory_may_be_the_target(tmp_path: Path, checkpoints: Any) -> None:
    (tmp_path / "p").mkdir()
    pack(checkpoints.write(tmp_path / "m", checkpoints.llama()), tmp_path / "p")
    verify(tmp_path / "p")


def test_two_packers_on_one_target_are_refused(tmp_path: Path, checkpoints: Any) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    with (
        Staging.locked(tmp_path / "p", "tierd-packing"),
        pytest.raises(TargetBusy, match=f"pid {os.getpid()}"),
    ):
        pack(source, tmp_path / "p")
    pack(source, tmp_path / "p")


def test_a_read_only_target_is_refused_by_name(
    tmp_path: Path, checkpoints: Any, mounted_tmpfs: Any
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama())
    with (
        mounted_tmpfs(tmp_path / "disk", "ro,size=1m") as disk,
        pytest.raises(TargetUnwritable, match=r"cannot write .*disk.*Read-only"),
    ):
        pack(source, disk / "p")


# --------------------------------------------------------------------------------------------------
# Interrupted runs

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
        ("tierd_tools.pack.copy_file", 2, 5),
        ("tierd_tools.pack.write_index", 1, 5),
        ("tierd_tools.pack_check.verify_layer", 3, 5),
        ("tierd_tools.pack.adopt_access", 1, 5),
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
    run_and_kill(source, tmp_path / "p", "tierd_tools.pack.Staging.remove", 1)
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
    monkeypatch.setattr(pack_module, "_SURE", 0.0)
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
    monkeypatch.setattr(pack_module, "_SURE", 0.0)
    with mounted_tmpfs(tmp_path / "disk", "size=8k") as disk:
        with pytest.raises(DiskFull, match="nothing was kept"):
            pack(source, disk / "p")
        assert list(disk.iterdir()) == []


def test_the_report_is_plain_data(tmp_path: Path, source: Path) -> None:
    import dataclasses

    report = dataclasses.asdict(pruned_pack(source, tmp_path / "p"))
    assert json.loads(json.dumps(report)) == report
    assert report["source_bytes"] > report["pack_bytes"] > 0
    assert (report["layers"], report["shards"], report["pruned_tensors"]) == (5, 5, 15)
