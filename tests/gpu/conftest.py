"""Tests that need a GPU: they say why they cannot run, and write down what they found."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tierd_tools.doctor import nvidia

if TYPE_CHECKING:
    from collections.abc import Callable

    Record = Callable[[str, object], None]

ANSWERS = Path("build/gpu/answers.jsonl")


@cache
def _problem() -> str | None:
    return nvidia.look().problem


@pytest.fixture(autouse=True)
def _gpu(request: pytest.FixtureRequest) -> None:
    """A GPU, where the test is marked with it."""
    if request.node.get_closest_marker("gpu") and (problem := _problem()):
        pytest.skip(f"no GPU: {problem}")


@pytest.fixture
def record() -> Record:
    """record(question, answer): one line of what `make gpu-acceptance` prints."""

    def write(question: str, answer: object) -> None:
        path = Path(os.environ.get("TIERD_GPU_ANSWERS", ANSWERS))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"question": question, "answer": str(answer)}) + "\n")

    return write
