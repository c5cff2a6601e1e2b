"""A toolkit's programs are looked for where CUDA puts them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tierd_tools import cuda_tools

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("ncu", "opt/nvidia/nsight-compute/2025.3.1"),
        ("ncu", "usr/local/cuda-13.0/bin"),
        ("compute-sanitizer", "usr/local/cuda-13.0/compute-sanitizer"),
    ],
)
def test_where_toolkits_are_installed(name: str, folder: str, tmp_path: Path) -> None:
    assert cuda_tools.find(name, {"PATH": ""}, tmp_path) is None
    path = tmp_path / folder / name
    path.parent.mkdir(parents=True)
    path.touch(0o644)
    assert cuda_tools.find(name, {"PATH": ""}, tmp_path) is None, "it cannot be run"
    path.chmod(0o755)
    assert cuda_tools.find(name, {"PATH": ""}, tmp_path) == path


def test_path_comes_before_cuda_home_and_that_before_toolkits(tmp_path: Path) -> None:
    toolkit, home, bin_dir = (
        tmp_path / folder for folder in ("usr/local/cuda/bin", "home/bin", "on-path")
    )
    for folder in (toolkit, home, bin_dir):
        folder.mkdir(parents=True)
        (folder / "ncu").touch(0o755)
    given = {"PATH": str(bin_dir), "CUDA_HOME": str(tmp_path / "home")}
    assert cuda_tools.find("ncu", given, tmp_path) == bin_dir / "ncu"
    assert cuda_tools.find("ncu", given | {"PATH": ""}, tmp_path) == home / "ncu"
    assert cuda_tools.find("ncu", {"PATH": ""}, tmp_path) == toolkit / "ncu"
