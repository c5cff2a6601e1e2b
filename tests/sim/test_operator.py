"""The operator of a fleet: each of its commands is answered at once, and a refusal has a reason."""

from __future__ import annotations

import random

import pytest

from tierd.core.model import OPERATOR, Done, Pin, Refuse, Unpin
from tierd.core.stack_model import TierBudgetChanged
from tierd.sim.errors import BrokenPromise
from tierd.sim.operator import Command, Operator

SERVED = (3, 4, 5)
G = 2 << 20


def drawn(operator: Operator, kind: type[Command]) -> Command:
    """The next command of this kind; all others are done."""
    while not isinstance(command := operator.command(0, SERVED, 6), kind):
        operator.answered(Done(command.request, ()))
    return command


def operator_of(seed: int = 0) -> Operator:
    return Operator(random.Random(seed), {None: 100 * G, 0: 50 * G})


def test_what_was_pinned_is_known_until_it_is_unpinned() -> None:
    operator = operator_of()
    operator.pinned.clear()
    command = drawn(operator, Pin)
    assert isinstance(command, Pin)
    operator.answered(Done(command.request, command.keys))
    assert set(operator.pinned) >= set(command.keys)
    last = operator.unpin_all(1)
    assert isinstance(last, Unpin)
    operator.answered(Done(last.request, last.keys))
    assert not operator.pinned


def test_a_refused_pin_pins_nothing() -> None:
    operator = operator_of(1)
    command = drawn(operator, Pin)
    before = dict(operator.pinned)
    operator.answered(Refuse(OPERATOR, command.request, "budget_too_small", ""))
    assert operator.pinned == before


def test_a_budget_is_in_effect_once_it_is_done_and_more_is_never_refused() -> None:
    operator = operator_of(2)
    command = drawn(operator, TierBudgetChanged)
    assert isinstance(command, TierBudgetChanged)
    operator.answered(Done(command.request, ()))
    assert operator.budgets[command.gpu] == command.budget_bytes
    for seed in range(20):
        operator = operator_of(seed)
        command = drawn(operator, TierBudgetChanged)
        assert isinstance(command, TierBudgetChanged)
        refusal = Refuse(OPERATOR, command.request, "budget_too_small", "")
        if command.budget_bytes >= operator.budgets[command.gpu]:
            with pytest.raises(BrokenPromise, match="takes nothing away"):
                operator.answered(refusal)
        else:
            operator.answered(refusal)
            assert operator.budgets[command.gpu] > command.budget_bytes


def test_a_command_without_an_answer_and_an_answer_without_a_command_are_noticed() -> None:
    operator = operator_of()
    command = operator.command(0, SERVED, 6)
    with pytest.raises(BrokenPromise, match="was not answered"):
        operator.check_answered()
    with pytest.raises(BrokenPromise, match="answers nothing"):
        operator.answered(Done(command.request + 1, ()))
    operator.answered(Done(command.request, ()))
    operator.check_answered()
