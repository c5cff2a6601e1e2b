"""tierd.json: what is read back, and a named error for each thing that can be wrong."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tierd_layouts import errors, index_json
from tierd_layouts.errors import FormatError
from tierd_layouts.index import Array, Extent, Layer, PackIndex, Shard, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

#: 70 x 130 of BF16: 2 x 3 tiles, 100 non-zeros.
RAW = {"bitmap": Array(0, 3072), "offsets": Array(3072, 28), "values": Array(3328, 256)}


def small_index() -> PackIndex:
    """Two shards; a layer of two extents, one of them of two blocks."""
    big = (4 << 20) + 4096
    return PackIndex(
        version=1,
        tool="tierd 0.1.0",
        source_digest="sha256:00ff",
        shards=(
            Shard("tierd-00001.safetensors", 4096 + big + 8192),
            Shard("tierd-00002.safetensors", 4096 + 4096),
        ),
        layers=(
            Layer(
                name="model.embed_tokens",
                nbytes=8192,
                extents=(Extent(0, 4096 + big, 8192, (2**64 - 1,)),),
                tensors=(
                    Tensor(
                        "model.embed_tokens.weight",
                        (70, 130),
                        "BF16",
                        "raw",
                        "row-major",
                        (64, 64),
                        100,
                        RAW,
                        "model.embed_tokens.weight",
                    ),
                ),
            ),
            Layer(
                name="model.layers.0",
                nbytes=big + 4096,
                extents=(Extent(0, 4096, big, (1, 2)), Extent(1, 4096, 4096, (3,))),
                tensors=(
                    dense("model.layers.0.a.weight", (3, 5), "F32", Array(256, 60)),
                    dense("model.layers.0.b.weight", (), "I64", Array(big, 8)),
                    dense("model.layers.0.c.weight", (0, 7), "F16", Array(big + 4096, 0)),
                ),
            ),
        ),
        aliases={"lm_head.weight": "model.embed_tokens.weight"},
        metadata={"format": "pt", "any key / ä\0": "any text"},
    )


def dense(name: str, shape: tuple[int, ...], dtype: str, array: Array) -> Tensor:
    nnz = 1
    for size in shape:
        nnz *= size
    return Tensor(name, shape, dtype, "dense", "row-major", None, nnz, {"data": array}, name)


def body() -> dict[str, Any]:
    members: dict[str, Any] = json.loads(small_index().to_json())
    return members


def sealed(members: dict[str, Any]) -> bytes:
    """Returns the text with a right checksum, so that only the change itself is wrong."""
    members = {key: value for key, value in members.items() if key != "xxh3"}
    return json.dumps({**members, "xxh3": index_json.digest(members)}).encode()


def parse(text: bytes) -> PackIndex:
    return PackIndex.parse(text, where="/packs/m")


def test_an_index_comes_back_as_it_was() -> None:
    index = small_index()
    text = index.to_json()
    again = parse(text)
    assert again == index
    assert again.digest == index.digest == json.loads(text)["xxh3"]
    assert again.to_json() == text


def test_the_digest_follows_every_hash() -> None:
    members = body()
    members["layers"][1]["extents"][0]["xxh3"][1] = "0" * 16
    changed = parse(sealed(members))
    assert changed.digest != small_index().digest


def test_the_layout_of_the_json_text_is_free() -> None:
    members = body()
    text = json.dumps(dict(reversed(members.items())), indent=None, ensure_ascii=False).encode()
    assert parse(text) == small_index()


def test_layers_and_tensors_are_found_by_name() -> None:
    index = small_index()
    assert index.layer("model.layers.0").nbytes == (4 << 20) + 8192
    layer, tensor = index.tensor("model.layers.0.a.weight")
    assert (layer.name, tensor.shape) == ("model.layers.0", (3, 5))
    assert index.tensor("lm_head.weight")[1].name == "model.embed_tokens.weight"


def test_unknown_names_are_key_errors_that_say_what_was_asked() -> None:
    index = small_index()
    with pytest.raises(errors.LayerNotFound, match=r"^the pack has no layer 'x'; it has 2$"):
        index.layer("x")
    with pytest.raises(errors.TensorNotFound, match="no tensor 'x'; it has 4"):
        index.tensor("x")
    assert issubclass(errors.LayerNotFound, KeyError)


def test_sizes_are_sums() -> None:
    index = small_index()
    assert index.pack_bytes == 8192 + (4 << 20) + 8192
    assert index.dense_bytes == 70 * 130 * 2 + 60 + 8


def test_the_constructor_refuses_what_parse_refuses() -> None:
    with pytest.raises(errors.HashCountWrong, match="0 hashes, 8192 bytes need 1"):
        PackIndex(
            1,
            "t",
            "",
            (Shard("a", 12288),),
            (Layer("l", 8192, (Extent(0, 4096, 8192, ()),), ()),),
        )
    with pytest.raises(errors.UnsupportedVersion):
        PackIndex(2, "t", "", (), ())


# --------------------------------------------------------------------------------------------------
# One change, one error


def put(path: str, value: Any) -> Callable[[dict[str, Any]], object]:
    """Returns a change that sets the member at `layers/1/extents/0/offset`."""

    def change(members: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        target: Any = members
        for step in parents:
            target = target[int(step) if isinstance(target, list) else step]
        if isinstance(target, list):
            target[int(last)] = value
        else:
            target[last] = value

    return change


def drop(path: str) -> Callable[[dict[str, Any]], object]:
    def change(members: dict[str, Any]) -> None:
        *parents, last = path.split("/")
        target: Any = members
        for step in parents:
            target = target[int(step) if isinstance(target, list) else step]
        del target[last]

    return change


def matrix(codec: str, masked: bool) -> Tensor:
    """A 70 x 130 matrix of BF16: 2 x 3 tiles, 2 groups of 128; 100 elements, or all 9100."""
    arrays = {"bitmap": 3072, "offsets": 28, "heads": 24, "scales": 512, "values": 0}
    if not masked:
        del arrays["bitmap"]
    del arrays["scales" if codec == "exponent-packed" else "heads"]
    arrays["values"] = {"exponent-packed": 192, "int8": 160, "int4": 96}[codec]
    if not masked:
        arrays["values"] = {"exponent-packed": 9120, "int8": 9104, "int4": 4560}[codec]
    placed, end = {}, 0
    for name, nbytes in arrays.items():
        placed[name] = Array(end, nbytes)
        end = -(-(end + nbytes) // 256) * 256
    return Tensor(
        name="w",
        shape=(70, 130),
        dtype="BF16",
        codec=codec,
        order="row-major",
        tile=(64, 64),
        nnz=100 if masked else 9100,
        arrays=placed,
        source="w",
        group=None if codec == "exponent-packed" else 128,
    )


FORMS = [
    (codec, masked) for codec in ("exponent-packed", "int8", "int4") for masked in (True, False)
]


def one_matrix(codec: str, masked: bool) -> dict[str, Any]:
    """The members of an index of one layer with this matrix."""
    layer = Layer("l", 16384, (Extent(0, 4096, 16384, (0,)),), (matrix(codec, masked),))
    index = PackIndex(1, "t", "", (Shard("s", 20480),), (layer,))
    members: dict[str, Any] = json.loads(index.to_json())
    return members


@pytest.mark.parametrize(("codec", "masked"), FORMS)
def test_matrices_of_every_codec_and_form_are_read(codec: str, masked: bool) -> None:
    index = parse(sealed(one_matrix(codec, masked)))
    assert index.tensor("w")[1] == matrix(codec, masked)


@pytest.mark.parametrize(("codec", "masked"), FORMS)
def test_each_array_of_a_matrix_has_its_length_and_belongs_to_its_codec(
    codec: str, masked: bool
) -> None:
    for name, array in matrix(codec, masked).arrays.items():
        members = one_matrix(codec, masked)
        put(f"layers/0/tensors/0/arrays/{name}/nbytes", array.nbytes - 4)(members)
        with pytest.raises(errors.ArrayBytesWrong, match=f"values have|'{name}' has"):
            parse(sealed(members))
        if name != "bitmap":
            members = one_matrix(codec, masked)
            drop(f"layers/0/tensors/0/arrays/{name}")(members)
            with pytest.raises(errors.ArraySetWrong, match=f"codec {codec} has"):
                parse(sealed(members))
    for name in {"heads", "scales", "data"} - set(matrix(codec, masked).arrays):
        members = one_matrix(codec, masked)
        put(f"layers/0/tensors/0/arrays/{name}", {"offset": 16384, "nbytes": 0})(members)
        with pytest.raises(errors.ArraySetWrong, match=f"'{name}'"):
            parse(sealed(members))


@pytest.mark.parametrize(("codec", "masked"), FORMS)
def test_values_that_no_elements_can_have_are_refused(codec: str, masked: bool) -> None:
    fewest, most = {
        ("exponent-packed", True): (112, 1056),
        ("int8", True): (112, 176),
        ("int4", True): (64, 143 // 16 * 16),
        # 4096 + 4096 + 128 + 384 + 384 + 12 elements; 8 bits of code and an escape for each
        ("exponent-packed", False): (9104, 54656),
        ("int8", False): (9104, 9104),
        ("int4", False): (4560, 4560),
    }[codec, masked]
    for nbytes, right in ((fewest, True), (most, True), (fewest - 16, False), (most + 16, False)):
        members = one_matrix(codec, masked)
        put("layers/0/nbytes", 1 << 20)(members)
        put("layers/0/extents/0/nbytes", 1 << 20)(members)
        put("shards/0/nbytes", 4096 + (1 << 20))(members)
        put("layers/0/tensors/0/arrays/values/nbytes", nbytes)(members)
        if right:
            parse(sealed(members))
        else:
            with pytest.raises(errors.ArrayBytesWrong, match=f"values have {nbytes} bytes"):
                parse(sealed(members))


@pytest.mark.parametrize(("codec", "masked"), FORMS)
def test_dense_forms_keep_all_and_masked_ones_at_most_all(codec: str, masked: bool) -> None:
    for nnz in (9101,) if masked else (9101, 9099, 0):
        members = one_matrix(codec, masked)
        put("layers/0/tensors/0/nnz", nnz)(members)
        with pytest.raises(errors.NnzWrong, match=f"nnz {nnz}, .* 9100 elements"):
            parse(sealed(members))


@pytest.mark.parametrize("group", [0, 1, 64 * 2 + 1, None])
def test_groups_are_multiples_of_64_columns(group: int | None) -> None:
    for codec in ("int8", "int4"):
        members = one_matrix(codec, True)
        put("layers/0/tensors/0/group", group)(members)
        with pytest.raises(errors.BadGroup, match=f"group {group}, needs a positive multiple"):
            parse(sealed(members))


def test_the_scales_follow_the_group() -> None:
    members = one_matrix("int8", True)
    put("layers/0/tensors/0/group", 64)(members)
    with pytest.raises(errors.ArrayBytesWrong, match=r"'scales' has 512 bytes, .* needs 768"):
        parse(sealed(members))
    members = one_matrix("int8", True)
    put("layers/0/tensors/0/group", 1 << 62)(members)
    with pytest.raises(errors.ArrayBytesWrong, match=r"'scales' has 512 bytes, .* needs 256"):
        parse(sealed(members))


RAW_TENSOR = "layers/0/tensors/0"
DENSE_TENSOR = "layers/1/tensors/0"


def shorten_layer_0(members: dict[str, Any]) -> None:
    put("layers/0/nbytes", 5000)(members)
    put("layers/0/extents/0/nbytes", 5000)(members)


def append_empty_extent(members: dict[str, Any]) -> None:
    empty = {"shard": 0, "offset": 4096, "nbytes": 0, "xxh3": []}
    members["layers"][0]["extents"].append(empty)


def grow_over_an_extent(members: dict[str, Any]) -> None:
    size = (4 << 20) // 4 + 1000
    put(f"{DENSE_TENSOR}/shape", [size])(members)
    put(f"{DENSE_TENSOR}/nnz", size)(members)
    put(f"{DENSE_TENSOR}/arrays/data/nbytes", size * 4)(members)


WRONG: list[tuple[str, type[FormatError], str, Callable[[dict[str, Any]], object]]] = [
    ("format", errors.WrongFormatName, "'other', expected 'tierd-pack'", put("format", "other")),
    ("no format", errors.WrongFormatName, "None", drop("format")),
    ("newer", errors.UnsupportedVersion, "version 2, this tierd reads 1", put("version", 2)),
    ("older", errors.UnsupportedVersion, "version 0", put("version", 0)),
    ("no version", errors.FieldInvalid, "version: expected an integer", drop("version")),
    ("no layers", errors.FieldMissing, "member 'layers' is missing", drop("layers")),
    ("no nnz", errors.FieldMissing, r"tensors\[0\]: member 'nnz'", drop(f"{RAW_TENSOR}/nnz")),
    ("extra", errors.UnknownField, "version 1 has no member 'zip'", put("zip", 1)),
    ("extra deep", errors.UnknownField, "'zip'", put("layers/1/extents/0/zip", 1)),
    ("extra in tensor", errors.UnknownField, "'zip'", put(f"{RAW_TENSOR}/zip", 1)),
    ("extra in array", errors.UnknownField, "'zip'", put(f"{RAW_TENSOR}/arrays/values/zip", 1)),
    ("extra in shard", errors.UnknownField, "'zip'", put("shards/0/zip", 1)),
    ("text", errors.FieldInvalid, "tool: expected text, found 5", put("tool", 5)),
    ("bool", errors.FieldInvalid, "found True", put("layers/0/nbytes", True)),
    ("negative", errors.FieldInvalid, "found -1", put("shards/0/nbytes", -1)),
    ("too large", errors.FieldInvalid, r"\[0, 2\^63\)", put("shards/0/nbytes", 2**63)),
    ("not a list", errors.FieldInvalid, "expected a list", put("layers/0/extents", {})),
    ("not an object", errors.FieldInvalid, "expected an object", put("layers/0", [])),
    ("shape text", errors.FieldInvalid, r"shape\[0\]", put(f"{RAW_TENSOR}/shape/0", "70")),
    ("tile of 3", errors.FieldInvalid, "2 integers, found 3", put(f"{RAW_TENSOR}/tile", [1, 2, 3])),
    ("no group", errors.FieldMissing, "member 'group'", drop(f"{RAW_TENSOR}/group")),
    ("group text", errors.FieldInvalid, "group: expected", put(f"{RAW_TENSOR}/group", "128")),
    ("raw group", errors.BadGroup, "codec raw has none", put(f"{RAW_TENSOR}/group", 128)),
    ("dense group", errors.BadGroup, "dense has none", put(f"{DENSE_TENSOR}/group", 0)),
    ("slice text", errors.FieldInvalid, "slice: expected a list", put(f"{RAW_TENSOR}/slice", "0")),
    ("hash", errors.FieldInvalid, "16 lower-case hex", put("layers/0/extents/0/xxh3/0", "FF" * 8)),
    ("surrogate", errors.FieldInvalid, "is not Unicode", put("tool", "\ud800")),
    ("surrogate key", errors.FieldInvalid, "is not Unicode", put("metadata", {"\ud800": ""})),
    ("metadata", errors.FieldInvalid, "expected text", put("metadata/format", None)),
    (
        "codec",
        errors.UnknownCodec,
        "'int3', known are 'dense', 'raw', 'exponent-packed', 'int8', 'int4'",
        put(f"{RAW_TENSOR}/codec", "int3"),
    ),
    (
        "order",
        errors.UnknownOrder,
        "'transposed', known are",
        put(f"{RAW_TENSOR}/order", "transposed"),
    ),
    ("dtype", errors.UnknownTensorDtype, "'F4'", put(f"{DENSE_TENSOR}/dtype", "F4")),
    ("raw dtype", errors.UnknownTensorDtype, "codec raw knows", put(f"{RAW_TENSOR}/dtype", "I16")),
    ("slice", errors.SliceRefused, "version 1 has none", put(f"{RAW_TENSOR}/slice", [0])),
    ("rank", errors.BadShape, "needs 2 dimensions", put(f"{RAW_TENSOR}/shape", [70, 130, 1])),
    ("65 dimensions", errors.BadShape, "limit is 64", put(f"{DENSE_TENSOR}/shape", [1] * 65)),
    ("huge", errors.BadShape, "too large", put(f"{RAW_TENSOR}/shape", [2**40, 2**40])),
    ("huge and empty", errors.BadShape, "too large", put(f"{RAW_TENSOR}/shape", [0, 2**62])),
    (
        "just too large for a matrix",
        errors.BadShape,
        "weight.: shape .*too large",
        put(f"{RAW_TENSOR}/shape", [0, 2**61]),
    ),
    ("tile", errors.BadTile, r"codec raw has \(64, 64\)", put(f"{RAW_TENSOR}/tile", [32, 64])),
    ("no tile", errors.BadTile, "codec raw", put(f"{RAW_TENSOR}/tile", None)),
    ("dense tile", errors.BadTile, "dense has none", put(f"{DENSE_TENSOR}/tile", [64, 64])),
    ("nnz", errors.NnzWrong, "nnz 9101, at most 9100", put(f"{RAW_TENSOR}/nnz", 9101)),
    ("dense nnz", errors.NnzWrong, "stores all 15", put(f"{DENSE_TENSOR}/nnz", 14)),
    ("no bitmap", errors.ArraySetWrong, "'offsets', 'values'", drop(f"{RAW_TENSOR}/arrays/bitmap")),
    (
        "extra array",
        errors.ArraySetWrong,
        "'scales'",
        put(f"{RAW_TENSOR}/arrays/scales", {"offset": 0, "nbytes": 0}),
    ),
    (
        "dense bytes",
        errors.ArrayBytesWrong,
        "59 bytes, .* needs 60",
        put(f"{DENSE_TENSOR}/arrays/data/nbytes", 59),
    ),
    (
        "bitmap bytes",
        errors.ArrayBytesWrong,
        "needs 3072",
        put(f"{RAW_TENSOR}/arrays/bitmap/nbytes", 3064),
    ),
    (
        "offsets bytes",
        errors.ArrayBytesWrong,
        "needs 28",
        put(f"{RAW_TENSOR}/arrays/offsets/nbytes", 24),
    ),
    (
        "values short",
        errors.ArrayBytesWrong,
        r"in \[200, 284\]",
        put(f"{RAW_TENSOR}/arrays/values/nbytes", 192),
    ),
    (
        "values long",
        errors.ArrayBytesWrong,
        "values have 288",
        put(f"{RAW_TENSOR}/arrays/values/nbytes", 288),
    ),
    (
        "values odd",
        errors.ArrayBytesWrong,
        "multiple of 16",
        put(f"{RAW_TENSOR}/arrays/values/nbytes", 250),
    ),
    (
        "misaligned",
        errors.ArrayMisaligned,
        "starts at 128",
        put(f"{DENSE_TENSOR}/arrays/data/offset", 128),
    ),
    (
        "out of range",
        errors.ArrayOutOfRange,
        r"\[8192, 8448\), the layer \[0, 8192\)",
        put(f"{RAW_TENSOR}/arrays/values/offset", 8192),
    ),
    (
        "far out",
        errors.ArrayOutOfRange,
        "the layer",
        put(f"{RAW_TENSOR}/arrays/values/offset", 2**63 - 256),
    ),
    (
        "overlap",
        errors.ArraysOverlap,
        "ends at 3100",
        put(f"{RAW_TENSOR}/arrays/values/offset", 3072),
    ),
    ("layer size", errors.LayerSizeWrong, "its 1 extents have 8192", put("layers/0/nbytes", 4096)),
    ("no extents", errors.LayerSizeWrong, "0 extents", put("layers/0/extents", [])),
    (
        "extent offset",
        errors.ExtentMisaligned,
        "8192 bytes at 100",
        put("layers/0/extents/0/offset", 100),
    ),
    ("extent length", errors.ExtentMisaligned, "5000 bytes", shorten_layer_0),
    ("empty extent", errors.ExtentMisaligned, "not empty", append_empty_extent),
    ("across", errors.ArrayAcrossExtents, "an extent ends at", grow_over_an_extent),
    (
        "in the header",
        errors.ExtentOutOfRange,
        r"\[0, 8192\) is not inside",
        put("layers/0/extents/0/offset", 0),
    ),
    (
        "after the shard",
        errors.ExtentOutOfRange,
        "is not inside",
        put("layers/0/extents/0/offset", 1 << 40),
    ),
    ("no such shard", errors.ExtentOutOfRange, "shard 2 of 2", put("layers/0/extents/0/shard", 2)),
    (
        "extents overlap",
        errors.ExtentsOverlap,
        "starts at",
        put("layers/0/extents/0/offset", 1 << 20),
    ),
    (
        "hashes",
        errors.HashCountWrong,
        "1 hashes, 4198400 bytes need 2",
        put("layers/1/extents/0/xxh3", ["0" * 16]),
    ),
    (
        "two shards",
        errors.DuplicateName,
        "shard 'tierd-00001.safetensors'",
        put("shards/1/file", "tierd-00001.safetensors"),
    ),
    (
        "two layers",
        errors.DuplicateName,
        "layer 'model.layers.0'",
        put("layers/0/name", "model.layers.0"),
    ),
    (
        "two tensors",
        errors.DuplicateName,
        "tensor 'model.layers.0.a.weight'",
        put(f"{RAW_TENSOR}/name", "model.layers.0.a.weight"),
    ),
    (
        "two stored",
        errors.DuplicateName,
        "stored array 'model.embed_tokens.weight.offsets'",
        put(f"{DENSE_TENSOR}/name", "model.embed_tokens.weight.offsets"),
    ),
    (
        "alias hides",
        errors.AliasInvalid,
        "also a stored tensor",
        put("aliases", {"model.layers.0.a.weight": "model.embed_tokens.weight"}),
    ),
    ("alias to none", errors.AliasInvalid, "points to 'x'", put("aliases/lm_head.weight", "x")),
    ("shard ..", errors.NameRefused, "file name", put("shards/0/file", "../../etc/passwd")),
    ("shard /", errors.NameRefused, "file name", put("shards/0/file", "/etc/passwd")),
    ("shard NUL", errors.NameRefused, "file name", put("shards/0/file", "a\0b")),
    ("layer ..", errors.NameRefused, "layer name", put("layers/0/name", "a..b")),
    ("tensor /", errors.NameRefused, "tensor name", put(f"{RAW_TENSOR}/name", "a/b")),
    ("tensor reserved", errors.NameRefused, "reserved", put(f"{RAW_TENSOR}/name", "__pad__.0")),
    ("source", errors.NameRefused, "tensor name", put(f"{RAW_TENSOR}/source", "a\0b")),
    (
        "alias NUL",
        errors.NameRefused,
        "tensor name",
        put("aliases", {"a\0": "model.embed_tokens.weight"}),
    ),
]


@pytest.mark.parametrize(
    ("error", "text", "change"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG]
)
def test_each_wrong_member_has_its_own_error(
    error: type[FormatError], text: str, change: Callable[[dict[str, Any]], object]
) -> None:
    members = body()
    change(members)
    with pytest.raises(error, match=text) as caught:
        parse(sealed(members))
    assert type(caught.value) is error


def test_every_index_error_is_raised_by_some_test_here() -> None:
    named = {row[1] for row in WRONG}
    elsewhere = {
        errors.IndexInvalid,  # the base
        errors.IndexMissing,  # test_pack_reader
        errors.IndexTooLarge,
        errors.IndexNotJson,
        errors.IndexChecksumWrong,
    }
    of_the_index = {
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.IndexInvalid)
    }
    assert of_the_index == (named & of_the_index) | elsewhere


def test_errors_name_the_pack_the_layer_and_the_tensor() -> None:
    members = body()
    put(f"{RAW_TENSOR}/codec", "int3")(members)
    with pytest.raises(errors.UnknownCodec) as caught:
        parse(sealed(members))
    text = str(caught.value)
    assert text.startswith("/packs/m: layer 'model.embed_tokens': tensor 'model.embed_tokens.")


def test_a_changed_byte_is_a_wrong_checksum() -> None:
    text = small_index().to_json()
    with pytest.raises(errors.IndexChecksumWrong, match=r"/packs/m: xxh3 of the index is"):
        parse(text.replace(b'"tierd 0.1.0"', b'"tierd 0.1.1"'))
    members = body()
    del members["xxh3"]
    with pytest.raises(errors.IndexChecksumWrong, match="it says None"):
        parse(json.dumps(members).encode())


def test_a_newer_version_is_named_even_when_its_checksum_rule_differs() -> None:
    members = body() | {"version": 7, "xxh3": {"another": "rule"}}
    with pytest.raises(errors.UnsupportedVersion, match="version 7"):
        parse(json.dumps(members).encode())


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"3",
        b"{",
        b"\xff",
        b'{"format": "tierd-pack", "format": "tierd-pack"}',
        b'{"format": "tierd-pack", "version": 1.0}',
        b'{"format": "tierd-pack", "version": NaN}',
        b'{"format": "tierd-pack", "version": ' + b"1" * 5000 + b"}",
        b'{"format": "tierd-pack", "version": 1, "a": ' + b"[" * 99999 + b"]" * 99999 + b"}",
    ],
    ids=lambda text: text[:50].decode("latin-1"),
)
def test_text_that_is_not_one_json_object_is_refused(text: bytes) -> None:
    with pytest.raises(errors.IndexNotJson, match=r"/packs/m: not an index"):
        parse(text)


@pytest.mark.parametrize("depth", [300, 900, 960, 990, 2000])
def test_nesting_of_any_depth_is_a_named_error(depth: int) -> None:
    members = b'{"format":"tierd-pack","version":1,"a":' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises((errors.IndexNotJson, errors.IndexChecksumWrong)):
        parse(members)


def test_an_index_above_its_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = small_index().to_json()
    monkeypatch.setattr(index_json, "MAX_INDEX_BYTES", len(text) - 1)
    with pytest.raises(errors.IndexTooLarge, match=f"{len(text)} bytes, the limit is"):
        parse(text)


# --------------------------------------------------------------------------------------------------
# Mutations: parsed or refused by name, never another exception

junk = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 5),
        st.sampled_from([4095, 4096, 4097, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30]),
        st.text(max_size=8),
        st.sampled_from(
            [
                "raw",
                "dense",
                "int4",
                "exponent-packed",
                "BF16",
                "F32",
                "row-major",
                "..",
                "\ud800",
                "0" * 16,
            ]
        ),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_mutated_index_is_refused_by_name_or_parses(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from([None, *FORMS]))
    members = body() if form is None else one_matrix(*form)
    for _ in range(data.draw(st.integers(1, 3))):
        target: Any = members
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            inner = target[key]
            if isinstance(inner, dict | list) and data.draw(st.integers(0, 3)):
                target = inner
                continue
            if isinstance(target, dict) and data.draw(st.booleans()):
                del target[key]
            else:
                target[key] = data.draw(junk)
            break
    text = sealed(members)
    try:
        index = parse(text)
    except FormatError:
        return
    assert parse(index.to_json()) == index


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_a_flipped_bit_never_goes_unnoticed(data: st.DataObject) -> None:
    text = bytearray(small_index().to_json())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(FormatError):
        assert parse(bytes(text)) == small_index()  # white space for white space
