"""What clients are owed: every answer once, and in time."""

from __future__ import annotations

import pytest

from tierd.core.model import Acquire, Admit, Later, LayerKey, Plan
from tierd.sim.errors import BrokenPromise
from tierd.sim.owed import Owed

KEY = LayerKey(0, 0)


def test_an_answer_that_is_late_is_a_broken_promise_and_one_that_came_is_not() -> None:
    owed = Owed()
    owed.asked(Acquire(0, 1, 1, KEY), 10)
    owed.asked(Acquire(0, 1, 2, KEY), 20)
    owed.answered(Later(1, 1))
    owed.check(20)
    with pytest.raises(BrokenPromise, match=r"at 21 ns .* has no answer"):
        owed.check(21)


def test_an_answer_to_nothing_is_a_broken_promise() -> None:
    owed = Owed()
    owed.asked(Acquire(0, 1, 1, KEY), 10)
    owed.answered(Later(1, 1))
    for action in (Later(1, 1), Later(2, 1)):
        with pytest.raises(BrokenPromise, match="answers nothing"):
            owed.answered(action)


def test_a_plan_waits_until_its_own_answer_comes_or_its_client_is_gone() -> None:
    owed = Owed()
    for client in (1, 2):
        owed.asked(Plan(0, client, 1, 0, (0,)), 10)
        owed.asked(Acquire(0, client, 2, KEY), 10)
    owed.answered(Later(1, 2))
    assert list(owed.plans) == [1, 2]
    owed.answered(Admit(1, 1, 0))
    assert list(owed.plans) == [2]
    owed.forget(2)
    assert not owed.plans
    assert not owed
    owed.check(1_000)
