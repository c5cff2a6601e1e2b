from __future__ import annotations

from pathlib import Path

import pytest

from tierd_layouts import errors

CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.LayoutsError)
]
#: Bases are caught, never raised.
BASES = {cls for cls in CLASSES if any(cls in other.__bases__ for other in CLASSES)}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_says_what_it_means_and_is_a_builtin_too(cls: type[Exception]) -> None:
    if not cls.__name__.startswith("_"):
        assert cls.__doc__
    if cls is not errors.LayoutsError:
        assert issubclass(cls, ValueError | KeyError | FileNotFoundError)


LEAVES = [cls for cls in CLASSES if cls not in BASES]


@pytest.mark.parametrize("cls", LEAVES, ids=lambda cls: cls.__name__)
def test_every_error_is_expected_by_some_test(cls: type[Exception]) -> None:
    here = Path(__file__)
    texts = [path.read_text() for path in here.parent.glob("test_*.py") if path != here]
    assert any(cls.__name__ in text for text in texts)


def test_the_text_of_a_missing_layer_is_not_a_repr() -> None:
    assert str(errors.LayerNotFound("no layer 'x'")) == "no layer 'x'"
