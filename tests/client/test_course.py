from __future__ import annotations

import threading
from typing import Any

from tierd_client.course import Course


class Opened:
    def __init__(self) -> None:
        self.plans: list[dict[str, Any]] = []

    def plan(self, order: Any, **fields: Any) -> int:
        self.plans.append({"order": tuple(order), **fields})
        return 0


def course_of(*order: int) -> tuple[Course, Opened]:
    opened: Any = Opened()
    return Course(opened, order, 3), opened


def test_the_order_is_declared_as_a_cycle_with_one_layer_ahead() -> None:
    _, opened = course_of(0, 1)
    assert opened.plans == [
        {"order": (0, 1), "kind": "cyclic", "lookahead": 1, "tokens_per_pass": 3}
    ]


def test_what_follows_is_the_next_of_a_circle() -> None:
    course, _ = course_of(0, 1, 7, 0)
    course.begin_pass()
    assert [course.advance(layer) for layer in (0, 1, 7, 0)] == [1, 7, 0, 0]
    assert course.advance(9) is None


def test_a_layer_that_comes_twice_is_followed_by_what_is_next_from_here() -> None:
    course, _ = course_of(0, 1, 0, 2)
    course.begin_pass()
    assert [course.advance(layer) for layer in (0, 1, 0)] == [1, 0, 2]
    course.begin_pass()
    assert course.advance(0) == 1


def test_each_thread_is_somewhere_else() -> None:
    course, _ = course_of(0, 1, 0, 2)
    course.advance(0)
    course.advance(1)
    seen: list[int | None] = []
    thread = threading.Thread(target=lambda: seen.append(course.advance(0)))
    thread.start()
    thread.join()
    assert seen == [1]
    assert course.advance(0) == 2


def test_the_first_whole_pass_is_learned_and_no_later_one() -> None:
    course, opened = course_of(0, 1, 2)
    for layers in ((2, 0), (0, 1, 2)):
        course.begin_pass()
        for layer in layers:
            course.advance(layer)
        course.end_pass()
    assert course.order == (2, 0)
    assert len(opened.plans) == 2


def test_a_pass_that_fails_is_not_learned() -> None:
    course, opened = course_of(0, 1)
    course.begin_pass()
    course.advance(1)
    course.begin_pass()
    course.advance(0)
    course.advance(1)
    course.end_pass()
    assert len(opened.plans) == 1
