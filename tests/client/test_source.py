from __future__ import annotations

from pathlib import Path

import pytest

from tierd_client.errors import PackInvalid
from tierd_client.source import control_directory, open_source, pack_directory


def make_pack(folder: Path) -> Path:
    folder.mkdir()
    (folder / "tierd.json").write_text("{}")
    return folder


def test_a_directory_with_an_index_is_a_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_pack(tmp_path / "llama")
    monkeypatch.chdir(tmp_path)
    assert pack_directory(folder) == pack_directory(str(folder)) == folder
    assert pack_directory("llama") == folder


def test_a_plain_word_is_a_served_name() -> None:
    assert pack_directory("no-such-model") is None


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_without_an_index_is_refused_and_not_taken_for_a_name(
    kind: type, tmp_path: Path
) -> None:
    with pytest.raises(PackInvalid, match=r"llama: no pack there, it has no tierd\.json"):
        pack_directory(kind(tmp_path / "llama"))


@pytest.mark.parametrize("name", ["x" * 300, "nul\0", "\ud800"])
def test_what_no_path_can_be_is_taken_for_a_name(name: str) -> None:
    assert pack_directory(name) is None


def test_a_damaged_index_is_named_before_anything_is_started(tmp_path: Path) -> None:
    folder = make_pack(tmp_path / "llama")
    with pytest.raises(PackInvalid, match=str(folder)):
        open_source(folder, str(tmp_path / "no.sock"))


def test_control_files_exist_only_inside_the_context() -> None:
    with control_directory({"config.json": b"{}", "a.txt": b"x"}) as folder:
        assert (folder / "config.json").read_bytes() == b"{}"
        assert len(list(folder.iterdir())) == 2
    assert not folder.exists()
