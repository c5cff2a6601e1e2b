"""Whether the kernels of models on GPUs work here: what is missing, and what is wrong, is named."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tierd_tools.doctor import kernels

if TYPE_CHECKING:
    from pathlib import Path

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton compiles here: no interpreter"
)


@interpreted
def test_kernels_that_compute_as_the_cpu_does_work() -> None:
    found = kernels.try_out("cpu")
    assert found["works"], found["text"]
    assert "expanded and multiplied as on the CPU" in found["text"]


@interpreted
def test_a_kernel_that_writes_something_else_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from tierd_kernels.gpu import expand

    def other(matrix: Any, out: Any) -> None:
        out.zero_()

    monkeypatch.setattr(expand, "expand", other)
    assert kernels.try_out("cpu") == {
        "works": False, "text": "a raw matrix was expanded to another one",
    }  # fmt: skip


def test_without_a_gpu_nothing_is_said_but_what_is_here() -> None:
    found = kernels.finding(present=False)
    assert found.verdict == "unknown"
    assert "no GPU to compile for" in found.text


def test_without_triton_or_a_compiler_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = kernels.finding(present=True)
    assert found.verdict == "does not work"
    assert "none of gcc, clang, cc is on PATH" in found.text
    monkeypatch.setattr(kernels, "_triton", lambda: None)
    found = kernels.finding(present=True)
    assert found.advice.startswith("pip install triton")
    assert not found.failed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the trial works")
def test_a_trial_that_fails_says_its_last_words() -> None:
    found = kernels.finding(present=True)
    assert found.verdict == "does not work"
    assert "the trial process ended with 1: " in found.text
    assert "-m tierd_tools.doctor.kernels" in found.advice
