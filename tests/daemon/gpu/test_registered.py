from __future__ import annotations

import pytest

from tierd.gpu.errors import DeviceError
from tierd.gpu.registered import Registered
from tierd.gpu.registration import Span


@pytest.fixture
def registered() -> Registered:
    registered = Registered("memfd")
    registered.add(0x1000, 0x1000)
    registered.add(0x2000, 0x1000)
    return registered


def test_memory_is_registered_once(registered: Registered) -> None:
    with pytest.raises(DeviceError, match="10 bytes at 0x1ff8 cannot be registered: a part is"):
        registered.add(0x1FF8, 10)
    with pytest.raises(DeviceError, match="nothing to register"):
        registered.add(0x9000, 0)
    registered.remove(0x1000)
    registered.remove(0x2000)
    registered.add(0x1FF8, 10)


def test_a_registration_ends_where_it_began(registered: Registered) -> None:
    with pytest.raises(DeviceError, match="no registration begins at 0x1001"):
        registered.remove(0x1001)


@pytest.mark.parametrize(
    "span",
    [
        Span(0x1800, 0x1000, pinned=True),  # over the end of one
        Span(0x2800, 0x1000, pinned=True),  # half of it in none
        Span(0x4000, 0x1000, pinned=True),  # in none
        Span(0x1000, 0x1000, pinned=False),  # in one, and not known to be
    ],
)
def test_a_copy_over_the_end_of_a_registration_is_refused(
    registered: Registered, span: Span
) -> None:
    with pytest.raises(DeviceError, match="are not in one registration"):
        registered.check([span])


def test_copies_in_one_registration_or_in_none_are_let_through(registered: Registered) -> None:
    registered.check([Span(0x1800, 0x800, pinned=True), Span(0x2000, 0x1000, pinned=True)])
    registered.check([Span(0x3000, 0x1000, pinned=False)])
