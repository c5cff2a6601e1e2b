"""That a calibration is kept; what it measures is tested with `calibrate`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tierd_layouts.container import open_pack, read_layer, tensor_bits
from tierd_tools import pack_plan
from tierd_tools.checkpoint import Checkpoint
from tierd_tools.errors import CalibrationError
from tierd_tools.pack import pack
from tierd_tools.pack_calibration import CALIBRATION_FILE
from tierd_tools.wanda import wanda

if TYPE_CHECKING:
    from pathlib import Path


def norms_of(checkpoint: Checkpoint, *arguments: Any, **options: Any) -> dict[str, np.ndarray]:
    """In place of `calibrate.input_norms`: as many as there are columns, of no model."""
    rng = np.random.default_rng(5)
    return {
        name: rng.uniform(0, 2, tensor.shape[1]).astype(np.float32)
        for name, tensor in sorted(checkpoint.tensors.items())
        if pack_plan.is_prunable(tensor)
    }


@pytest.fixture
def calibrations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `input_norms` was called with."""
    calls: list[Any] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return norms_of(*arguments, **options)

    # Not the module's attribute: importing it takes seconds.
    monkeypatch.setitem(sys.modules, "tierd_tools.calibrate", SimpleNamespace(input_norms=counted))
    return calls


@pytest.fixture
def source(tmp_path: Path, checkpoints: Any) -> Path:
    (tmp_path / "text").write_text("once upon a time")
    written: Path = checkpoints.write(tmp_path / "m", checkpoints.llama())
    return written


def run(source: Path, sparsity: float = 0.5) -> Any:
    folder = source.parent
    return pack(
        source,
        folder / "p",
        prune="wanda",
        sparsity=sparsity,
        keep=["*.k_proj"],
        calibration=folder / "text",
        calibration_windows=3,
    )


def test_wanda_prunes_by_the_calibration_and_leaves_nothing_of_it_in_the_pack(
    source: Path, calibrations: list[Any]
) -> None:
    report = run(source)
    assert report.pruned_tensors == 3 * 4
    (((_, text, sparsities), options),) = calibrations
    assert text == source.parent / "text"
    assert options["windows"] == 3
    assert sparsities.of("model.layers.0.self_attn.k_proj.weight") == 0.0
    checkpoint = Checkpoint.open(source)
    norms = norms_of(checkpoint)
    index = open_pack(source.parent / "p")
    for name in ("model.layers.2.mlp.up_proj.weight", "model.layers.2.self_attn.k_proj.weight"):
        layer, tensor = index.tensor(name)
        found = tensor_bits(read_layer(source.parent / "p", index, layer), tensor)
        bits = checkpoint.tensors[name].read_bits()
        pruned = bits if "k_proj" in name else wanda(bits, "BF16", norms[name], 0.5)
        assert np.array_equal(found, pruned)
    assert not any(file.name.startswith(".") for file in (source.parent / "p").iterdir())


#: Kills itself when the Nth layer is durable.
KILLED = """
import os, pathlib, runpy, signal, sys, types
from tierd_tools import pack, pack_journal
test = runpy.run_path(sys.argv[1])
sys.modules["tierd_tools.calibrate"] = types.SimpleNamespace(input_norms=test["norms_of"])
add, calls = pack_journal.Journal.add, [0]
def killer(journal, finished):
    calls[0] += 1
    if calls[0] > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    add(journal, finished)
pack_journal.Journal.add = killer
test["run"](pathlib.Path(sys.argv[2]))
"""


@pytest.mark.parametrize("layers", [0, 2])
def test_a_run_that_is_killed_does_not_calibrate_again(
    source: Path, calibrations: list[Any], layers: int
) -> None:
    command = [sys.executable, "-c", KILLED, __file__, str(source), str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert run(source).layers_reused == layers
    assert calibrations == []
    report = run(source, 0.6)  # another job
    assert report.layers_reused == 0
    assert len(calibrations) == 1


def test_a_calibration_that_was_damaged_meanwhile_is_made_again(
    source: Path, calibrations: list[Any]
) -> None:
    command = [sys.executable, "-c", KILLED, __file__, str(source), "1"]
    subprocess.run(command, capture_output=True, check=False, timeout=120)
    path = source.parent / ".p.tierd-packing" / CALIBRATION_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert run(source).layers_reused == 1
    assert len(calibrations) == 1


def test_a_run_with_nothing_left_to_prune_does_not_calibrate(
    source: Path, calibrations: list[Any]
) -> None:
    command = [sys.executable, "-c", KILLED, __file__, str(source), "4"]
    subprocess.run(command, capture_output=True, check=False, timeout=120)
    os.unlink(source.parent / ".p.tierd-packing" / CALIBRATION_FILE)
    assert run(source).layers_reused == 4
    assert calibrations == []


def test_a_calibration_that_fails_leaves_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise CalibrationError("no such model")

    monkeypatch.setitem(sys.modules, "tierd_tools.calibrate", SimpleNamespace(input_norms=failing))
    with pytest.raises(CalibrationError, match="no such model; nothing was kept"):
        run(source)
    assert sorted(file.name for file in source.parent.iterdir()) == ["m", "text"]
