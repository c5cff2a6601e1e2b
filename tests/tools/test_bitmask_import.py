from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tierd_tools.bitmask import encode
from tierd_tools.checkpoint import IMPORT_NOTE, Checkpoint
from tierd_tools.errors import CheckpointError
from tierd_tools.pack import pack

if TYPE_CHECKING:
    from pathlib import Path

Stored = tuple[str, tuple[int, ...], bytes]
DENSE = np.array([[1, 0, 3, 0, 0, 0, 0, 0, 9], [0] * 9, [0, 0x7FC1, 0, 2, 0, 0, 0, 8, 0]], "<u2")


def dense(bits: np.ndarray[Any, Any]) -> Stored:
    return "BF16", bits.shape, bits.tobytes()


def integers(*values: int, shape: tuple[int, ...] | None = None) -> Stored:
    return "I64", shape or (len(values),), np.array(values, "<i8").tobytes()


def parts(prefix: str, bits: np.ndarray[Any, Any], **other: Stored | None) -> dict[str, Stored]:
    """The tensors of a weight; `other` replaces some or, None, leaves them out."""
    encoded = encode(np.atleast_2d(bits))
    mask = encoded.bitmask.reshape(*bits.shape[:-1], -1)
    found: dict[str, Stored | None] = {
        "shape": integers(*bits.shape),
        "compressed": ("BF16", encoded.values.shape, encoded.values.tobytes()),
        "bitmask": ("U8", mask.shape, mask.tobytes()),
        "row_offsets": integers(
            *encoded.row_offsets.tolist(), shape=() if bits.ndim == 1 else bits.shape[:-1]
        ),
    }
    found |= other
    return {f"{prefix}.{part}": stored for part, stored in found.items() if stored}


def read(folder: Path) -> dict[str, Stored]:
    tensors = Checkpoint.open(folder).tensors
    for name, tensor in tensors.items():
        assert tensor.name == name
    return {name: (t.dtype, t.shape, t.read().tobytes()) for name, t in tensors.items()}


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_stripped_names_get_their_weight_back(
    tmp_path: Path, checkpoints: Any, shards: int
) -> None:
    tensors = parts("a.0.up", DENSE) | {"a.0.up.bias": dense(DENSE[0]), "n.weight": dense(DENSE[2])}
    folder = checkpoints.write(tmp_path / "m", tensors, shards=shards)
    assert read(folder) == {
        "a.0.up.weight": dense(DENSE),
        "a.0.up.bias": dense(DENSE[0]),
        "n.weight": dense(DENSE[2]),
    }


def test_whole_names_are_kept_for_every_kind_of_parameter(tmp_path: Path, checkpoints: Any) -> None:
    names = ("a.0.up.weight", "a.0.up.bias", "a.0.decay")
    tensors = parts(names[0], DENSE) | parts(names[1], DENSE[0]) | parts(names[2], DENSE[2])
    found = read(checkpoints.write(tmp_path / "m", tensors))
    assert found == dict(zip(names, map(dense, (DENSE, DENSE[0], DENSE[2])), strict=True))


def test_two_of_four_values_are_read_row_by_row_or_not(tmp_path: Path, checkpoints: Any) -> None:
    # Groups of four run over the ends of rows, so the rows have three values each only on average.
    mask = np.array([[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0]], np.uint8)
    bits = np.array([[1, 2, 0, 0, 3, 0], [0, 0, 5, 6, 0, 0]], "<u2")
    values = bits[mask.astype(bool)]
    tensors = {
        "a.shape": integers(2, 6, shape=(2, 1)),
        "a.compressed": ("BF16", (2, 3), values.tobytes()),
        "a.bitmask": ("U8", (2, 1), np.packbits(mask, axis=1, bitorder="little").tobytes()),
    }
    folder = checkpoints.write(tmp_path / "m", tensors)
    assert read(folder) == {"a.weight": dense(bits)}
    assert Checkpoint.open(folder).imported == "1 tensors from sparse-24-bitmask"


def test_an_all_zero_weight_has_no_values(tmp_path: Path, checkpoints: Any) -> None:
    zero = np.zeros((4, 5), "<u2")
    assert read(checkpoints.write(tmp_path / "m", parts("a", zero))) == {"a.weight": dense(zero)}


@pytest.mark.parametrize("offsets", [None, integers(9, 9, 9), integers(1), dense(DENSE)])
def test_row_offsets_are_not_looked_at(
    tmp_path: Path, checkpoints: Any, offsets: Stored | None
) -> None:
    folder = checkpoints.write(tmp_path / "m", parts("a", DENSE, row_offsets=offsets))
    assert read(folder) == {"a.weight": dense(DENSE)}


def test_tensors_that_are_only_named_like_parts_stay(tmp_path: Path, checkpoints: Any) -> None:
    tensors = {
        "a.shape": dense(DENSE),
        "b.bitmask": dense(DENSE),
        "c.compressed": dense(DENSE),
        "d.row_offsets": integers(1, 2),
        "e.shape": dense(DENSE),
        "e.bitmask": dense(DENSE),
        "shape": integers(1),
        "bitmask": ("U8", (1,), b"\1"),
        "compressed": dense(DENSE),
    }
    folder = checkpoints.write(tmp_path / "m", tensors)
    assert read(folder) == tensors
    assert Checkpoint.open(folder).imported == ""
    assert IMPORT_NOTE not in Checkpoint.open(folder).metadata


@pytest.mark.parametrize("missing", ["shape", "compressed", "bitmask"])
def test_a_weight_that_lacks_a_part_is_refused(
    tmp_path: Path, checkpoints: Any, missing: str
) -> None:
    folder = checkpoints.write(tmp_path / "m", parts("a.0.up", DENSE, **{missing: None}))
    with pytest.raises(CheckpointError, match=rf"a\.0\.up\..* compressed weight without {missing}"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("part", "stored", "text"),
    [
        ("shape", integers(3, 17), r"'a\.bitmask' has shape \[3, 2\], .*\[3, 17\] needs \[3, 3\]"),
        ("shape", integers(9, 3), r"'a\.bitmask' has shape"),
        ("shape", integers(27), r"'a\.bitmask' has shape"),
        ("shape", integers(-3, 9), r"'a\.shape' says that 'a\.weight' has shape \[-3, 9\]"),
        ("shape", integers(shape=(0,)), r"'a\.shape' has 0 elements"),
        ("shape", integers(*[1] * 65), r"'a\.shape' has 65 elements"),
        ("shape", integers(3, 9, shape=(1, 2)), r"'a\.shape' is I64\[1, 2\]"),
        ("shape", ("F32", (0,), b""), r"'a\.shape' is F32\[0\]"),
        ("bitmask", ("I64", (3, 2), bytes(48)), r"'a\.bitmask' is I64, a bitmask is U8"),
        ("bitmask", ("U8", (6,), bytes(6)), r"'a\.bitmask' has shape \[6\]"),
        ("compressed", ("BF16", (28,), bytes(56)), r"'a\.compressed' has shape \[28\]"),
        ("compressed", ("BF16", (1, 1, 6), bytes(12)), r"'a\.compressed' has shape \[1, 1, 6\]"),
    ],
)
def test_parts_that_contradict_each_other_are_refused_by_name(
    tmp_path: Path, checkpoints: Any, part: str, stored: Stored, text: str
) -> None:
    folder = checkpoints.write(tmp_path / "m", parts("a", DENSE, **{part: stored}))
    with pytest.raises(CheckpointError, match=text):
        Checkpoint.open(folder)


def test_a_weight_that_is_there_twice_is_refused(tmp_path: Path, checkpoints: Any) -> None:
    tensors = parts("a", DENSE) | {"a.weight": dense(DENSE)}
    folder = checkpoints.write(tmp_path / "m", tensors)
    with pytest.raises(CheckpointError, match=r"'a\.weight' is there twice: .* a\.bitmask"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name", ["a.0.up.weight_scale", "a.1.up.input_scale", "a.0.up.weight_packed"]
)
@pytest.mark.parametrize("compressed", [False, True])
def test_quantised_weights_are_refused_with_the_reason(
    tmp_path: Path, checkpoints: Any, name: str, compressed: bool
) -> None:
    tensors = parts("a.0.up.weight", DENSE)
    tensors |= parts(name, DENSE[0]) if compressed else {name: dense(DENSE[0])}
    folder = checkpoints.write(tmp_path / "m", tensors)
    with pytest.raises(CheckpointError, match=rf"'{name}'.* quantised .*not imported: .* scales"):
        Checkpoint.open(folder)


def test_quantised_tensors_alone_are_left_to_who_reads_them(
    tmp_path: Path, checkpoints: Any
) -> None:
    tensors = {"a.0.up.weight": dense(DENSE), "a.0.up.weight_scale": dense(DENSE[0])}
    assert read(checkpoints.write(tmp_path / "m", tensors)) == tensors


def test_bits_that_do_not_count_the_values_stop_the_packer(
    tmp_path: Path, checkpoints: Any
) -> None:
    weight = parts("model.layers.0.up", DENSE)
    weight["model.layers.0.up.compressed"] = ("BF16", (4,), bytes(8))
    folder = checkpoints.write(tmp_path / "m", weight)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.up\.weight.* 6 bits .* 4 values"):
        pack(folder, tmp_path / "p")
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


def test_a_file_that_shrinks_after_it_was_opened_is_refused(
    tmp_path: Path, checkpoints: Any
) -> None:
    folder = checkpoints.write(tmp_path / "m", parts("a", DENSE))
    tensor = Checkpoint.open(folder).tensors["a.weight"]
    shard = folder / "model.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"ends at byte .*'a\.bitmask'"):
        tensor.read()


def test_tied_weights_are_found_when_one_of_them_is_compressed(
    tmp_path: Path, checkpoints: Any
) -> None:
    from tierd_tools.pack_plan import _tied

    tensors = parts("lm_head", DENSE) | {"model.embed_tokens.weight": dense(DENSE)}
    checkpoint = Checkpoint.open(checkpoints.write(tmp_path / "m", tensors))
    assert _tied(checkpoint) == {"lm_head.weight": "model.embed_tokens.weight"}


def test_the_fingerprint_is_that_of_the_files(tmp_path: Path, checkpoints: Any) -> None:
    folder = checkpoints.write(tmp_path / "m", parts("a", DENSE))
    first = Checkpoint.open(folder).fingerprint()
    assert Checkpoint.open(folder).fingerprint() == first
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(folder).fingerprint() != first
