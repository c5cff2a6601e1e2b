from __future__ import annotations

import pickle

import pytest

from tierd import errors
from tierd_layouts.wire import ErrorCode

CLASSES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.TierdError)
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_says_its_text_and_has_a_code_of_the_wire(
    kind: type[errors.TierdError],
) -> None:
    error = kind("layer 'a' needs 4 bytes")
    assert str(error) == error.text == "layer 'a' needs 4 bytes"
    assert error.code in list(ErrorCode)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("kind", CLASSES[1:], ids=lambda kind: kind.__name__)
def test_every_error_is_also_a_builtin_and_is_in_the_list(kind: type[errors.TierdError]) -> None:
    assert any(base.__module__ == "builtins" for base in kind.__mro__ if base is not Exception)
    assert kind.__name__ in (errors.__doc__ or "")
