from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierd_tools import unpack_bitmask, unpack_plan
from tierd_tools.checkpoint import Checkpoint
from tierd_tools.errors import BadSetting, CheckpointError, PackError, TargetRefused
from tierd_tools.pack import pack
from tierd_tools.unpack import unpack

if TYPE_CHECKING:
    from pathlib import Path

Stored = tuple[str, tuple[int, ...], bytes]
ITEM = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}
NAN = {"BF16": 0xFFC1, "F16": 0x7C01, "F32": 0x7F800001}


def matrix(
    dtype: str, rows: int, columns: int, *, kept: float, negative_zeros: int = 0, seed: int = 0
) -> Stored:
    """Random weights; the first ones are -0.0, then NaN; row 1 is empty where there are four."""
    rng = np.random.default_rng([rows, columns, seed])
    if dtype == "F16":
        bits = rng.normal(0, 0.02, (rows, columns)).astype("<f2").view("<u2")
    else:
        bits = rng.normal(0, 0.02, (rows, columns)).astype("<f4").view("<u4")
        bits = (bits >> 16).astype("<u2") if dtype == "BF16" else bits
    bits[rng.random(bits.shape) >= kept] = 0
    if rows > 3:
        bits[1] = 0
    flat = bits.reshape(-1)
    flat[:negative_zeros] = 1 << (bits.itemsize * 8 - 1)
    flat[negative_zeros : negative_zeros + 1] = NAN[dtype]
    return dtype, (rows, columns), bits.tobytes()


def positive(stored: Stored) -> Stored:
    """With 0.0 for -0.0."""
    dtype, shape, data = stored
    bits = np.frombuffer(data, ITEM[dtype]).copy()
    bits[bits == 1 << (bits.itemsize * 8 - 1)] = 0
    return dtype, shape, bits.tobytes()


def small_model() -> dict[str, Stored]:
    return {
        "model.embed_tokens.weight": matrix("BF16", 20, 32, kept=0.3),
        "model.layers.0.input_layernorm.weight": ("BF16", (4,), bytes(8)),
        "model.layers.0.self_attn.q_proj.weight": matrix("BF16", 33, 47, kept=0.5),
        "model.layers.0.self_attn.q_proj.bias": ("BF16", (33,), bytes(66)),
        "model.layers.0.mlp.up_proj.weight": matrix("F16", 64, 71, kept=0.5, negative_zeros=5),
        "model.layers.1.mlp.up_proj.weight": matrix("F32", 70, 64, kept=0.4, negative_zeros=2),
        "model.layers.1.self_attn.q_proj.weight": matrix("BF16", 33, 47, kept=1.0),
        "lm_head.weight": matrix("BF16", 20, 32, kept=0.3, negative_zeros=1, seed=1),
    }


@pytest.fixture
def packed(tmp_path: Path, checkpoints: Any) -> Path:
    pack(checkpoints.write(tmp_path / "m", small_model()), tmp_path / "p")
    return tmp_path / "p"


def exported(folder: Path, packed: Path) -> Any:
    return unpack(packed, folder, format="sparse-bitmask")


def read(folder: Path) -> dict[str, Stored]:
    tensors = Checkpoint.open(folder).tensors
    return {name: (t.dtype, t.shape, t.read().tobytes()) for name, t in tensors.items()}


COMPRESSED = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.up_proj",
)


def test_linear_weights_that_get_smaller_are_compressed_and_others_stay(
    tmp_path: Path, packed: Path, checkpoints: Any
) -> None:
    report = exported(tmp_path / "out", packed)
    found = checkpoints.read(tmp_path / "out")
    model = small_model()
    for module in COMPRESSED:
        dtype, shape, data = model.pop(f"{module}.weight")
        bits = np.frombuffer(data, ITEM[dtype]).reshape(shape)
        kept = bits & ((1 << (bits.itemsize * 8 - 1)) - 1) != 0
        mask = np.packbits(kept, axis=1, bitorder="little")
        offsets = np.cumsum([0, *kept.sum(axis=1)[:-1]]).astype("<i8")
        model[f"{module}.shape"] = ("I64", (2,), np.array(shape, "<i8").tobytes())
        model[f"{module}.compressed"] = (dtype, (kept.sum(),), bits[kept].tobytes())
        model[f"{module}.bitmask"] = ("U8", mask.shape, mask.tobytes())
        model[f"{module}.row_offsets"] = ("I64", (shape[0],), offsets.tobytes())
    assert found == model
    assert (report.tensors, report.compressed_tensors, report.format) == (8, 3, "sparse-bitmask")
    assert report.nbytes == sum(len(data) for _, _, data in model.values())


def test_elements_of_minus_zero_that_were_lost_are_counted(tmp_path: Path, packed: Path) -> None:
    report = exported(tmp_path / "out", packed)
    assert report.negative_zeros == 7  # that of the dense head is not lost
    assert "3 tensors as sparse-bitmask; 7 elements of -0.0 became 0.0" in report.summary()
    model = small_model()
    assert read(tmp_path / "out") == {
        name: positive(stored) if name.removesuffix(".weight") in COMPRESSED else stored
        for name, stored in model.items()
    }
    plain = unpack(packed, tmp_path / "plain")
    assert (plain.negative_zeros, plain.compressed_tensors) == (0, 0)
    assert plain.summary().count("\n") == 0


def test_the_config_names_exactly_the_modules_that_are_compressed(
    tmp_path: Path, packed: Path
) -> None:
    exported(tmp_path / "out", packed)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("model_type") == "test"
    section = config.pop("quantization_config")["sparsity_config"]
    assert config == {}
    assert section["targets"] == [
        "model.layers.0.self_attn.q_proj",
        r"re:model\.layers\.\d+\.mlp\.up_proj$",
    ]
    model = small_model()
    zeros = elements = 0
    for name, (dtype, _, data) in model.items():
        bits = np.frombuffer(data, ITEM[dtype])
        zeros += int((bits & ((1 << (bits.itemsize * 8 - 1)) - 1) == 0).sum())
        elements += bits.size
        assert name
    assert section["global_sparsity"] == zeros / elements
    assert section["ignore"] == []


def test_an_export_is_cut_into_shards_that_hold_all_parts_of_a_weight(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack_plan, "SHARD_BYTES", 4096)
    report = exported(tmp_path / "out", packed)
    assert report.shards > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for module in COMPRESSED:
        parts = ("shape", "compressed", "bitmask", "row_offsets")
        assert len({index["weight_map"][f"{module}.{part}"] for part in parts}) == 1
    assert index["metadata"]["total_size"] == report.nbytes
    assert read(tmp_path / "out")["lm_head.weight"] == small_model()["lm_head.weight"]


def test_an_exported_pack_can_be_packed_again(tmp_path: Path, packed: Path) -> None:
    exported(tmp_path / "out", packed)
    pack(tmp_path / "out", tmp_path / "again")
    unpack(tmp_path / "again", tmp_path / "back")
    assert read(tmp_path / "back") == read(tmp_path / "out")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == {"model_type": "test"}


@pytest.mark.parametrize("codec", ["raw", "lossless", "int8", "int4"])
def test_every_codec_is_exported_as_its_decoded_weights(
    tmp_path: Path, checkpoints: Any, codec: str
) -> None:
    source = checkpoints.write(tmp_path / "m", checkpoints.llama(layers=2))
    pack(source, tmp_path / "p", prune="magnitude", sparsity=0.5, codec=codec)
    plain = unpack(tmp_path / "p", tmp_path / "plain")
    report = exported(tmp_path / "out", tmp_path / "p")
    assert report.compressed_tensors == 10
    assert read(tmp_path / "out") == {
        name: positive(stored) for name, stored in checkpoints.read(tmp_path / "plain").items()
    }
    lossy = 10 if codec.startswith("int") else 0
    assert report.lossy_tensors == plain.lossy_tensors == lossy
    for summary in (report.summary(), plain.summary()):
        assert ("lossy: 10 tensors hold rounded values" in summary) == bool(lossy)


def test_random_matrices_come_back(
    tmp_path_factory: pytest.TempPathFactory, checkpoints: Any
) -> None:
    sizes = st.tuples(st.integers(1, 150), st.integers(1, 150))

    @settings(deadline=None, max_examples=25)
    @given(
        shapes=st.lists(sizes, min_size=1, max_size=3),
        dtype=st.sampled_from(sorted(ITEM)),
        kept=st.floats(0, 0.8),
        negative_zeros=st.integers(0, 3),
    )
    def check(shapes: list[tuple[int, int]], dtype: str, kept: float, negative_zeros: int) -> None:
        folder = tmp_path_factory.mktemp("random")
        tensors = {
            f"layers.{i}.up.weight": matrix(
                dtype, rows, columns, kept=kept, negative_zeros=negative_zeros, seed=i
            )
            for i, (rows, columns) in enumerate(shapes)
        }
        tensors["layers.99.up.weight"] = matrix(dtype, 64, 64, kept=0.1)  # one surely gets smaller
        pack(checkpoints.write(folder / "m", tensors), folder / "p")
        report = exported(folder / "out", folder / "p")
        found = read(folder / "out")
        raw = checkpoints.read(folder / "out")
        lost = 0
        for name, stored in tensors.items():
            if name in raw:
                assert found[name] == stored
            else:
                assert found[name] == positive(stored)
                bits = np.frombuffer(stored[2], ITEM[dtype])
                lost += int((bits == 1 << (bits.itemsize * 8 - 1)).sum())
        assert found.keys() == tensors.keys()
        assert report.negative_zeros == lost

    check()


# --------------------------------------------------------------------------------------------------
# Refusals


def test_a_pack_in_which_nothing_gets_smaller_is_refused(tmp_path: Path, checkpoints: Any) -> None:
    pack(checkpoints.write(tmp_path / "m", checkpoints.llama(layers=1)), tmp_path / "p")
    with pytest.raises(PackError, match=r"no linear weight gets smaller .* 0\.0 % .* are zeros"):
        exported(tmp_path / "out", tmp_path / "p")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m", "p"]


@pytest.mark.parametrize("part", ["shape", "compressed", "bitmask", "row_offsets"])
def test_a_tensor_that_readers_would_take_for_a_part_is_refused(
    tmp_path: Path, checkpoints: Any, part: str
) -> None:
    tensors = small_model() | {f"model.image.{part}": ("BF16", (2,), bytes(4))}
    pack(checkpoints.write(tmp_path / "m", tensors), tmp_path / "p")
    with pytest.raises(PackError, match=rf"'model\.image\.{part}' has a name"):
        exported(tmp_path / "out", tmp_path / "p")
    unpack(tmp_path / "p", tmp_path / "out")


def test_a_quantised_config_is_refused_before_anything_is_decoded(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (packed / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    monkeypatch.setattr(unpack_bitmask.Census, "add", None)
    with pytest.raises(PackError, match=r"config\.json has a quantization_config already"):
        exported(tmp_path / "out", packed)


@pytest.mark.parametrize("text", [None, "", "[]"])
def test_an_export_needs_a_config(tmp_path: Path, packed: Path, text: str | None) -> None:
    (packed / "config.json").unlink()
    if text is not None:
        (packed / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        exported(tmp_path / "out", packed)


def test_an_unknown_format_is_usage(tmp_path: Path, packed: Path) -> None:
    with pytest.raises(BadSetting, match="'gguf' is unknown: checkpoint, sparse-bitmask"):
        unpack(packed, tmp_path / "out", format="gguf")  # type: ignore[arg-type]


def test_a_target_in_use_is_refused_before_anything_is_decoded(
    tmp_path: Path, packed: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").touch()
    with pytest.raises(TargetRefused):
        exported(tmp_path / "out", packed)


def test_a_module_called_weight_stays_dense_so_that_names_stay_clear(
    tmp_path: Path, checkpoints: Any
) -> None:
    name = "layers.0.weight.weight"
    tensors = {name: matrix("BF16", 64, 64, kept=0.1), **small_model()}
    pack(checkpoints.write(tmp_path / "m", tensors), tmp_path / "p")
    exported(tmp_path / "out", tmp_path / "p")
    assert checkpoints.read(tmp_path / "out")[name] == tensors[name]
    assert read(tmp_path / "out").keys() == tensors.keys()
