"""Calls that meet: one runs at a time, questions are answered together, and faults stay where they belong."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from fedtune.training.meeting import Meeting
from fedtune.types import CancelledError


def doubling(asked: list[list[Any]]) -> Meeting:
    def answer(questions: list[Any]) -> list[Any]:
        asked.append(list(questions))
        return [ValueError(q) if q == "bad" else q * 2 for q in questions]

    return Meeting(answer)


def test_questions_are_answered_together_in_order() -> None:
    asked: list[list[Any]] = []
    meeting = doubling(asked)

    def call(n: int) -> list[int]:
        return [meeting.ask(n + step) for step in range(n)]

    assert meeting.together([partial(call, n) for n in (1, 3, 2)]) == [[2], [6, 8, 10], [4, 6]]
    assert asked == [[1, 3, 2], [4, 3], [5]]
    assert meeting.ask(21) == 42


def test_inner_calls_join_the_meeting_they_are_made_in() -> None:
    asked: list[list[Any]] = []
    meeting = doubling(asked)

    def outer(n: int) -> int:
        return sum(meeting.together([partial(meeting.ask, 10 * n + k) for k in range(2)]))

    assert meeting.together([partial(outer, n) for n in (1, 2)]) == [42, 82]
    assert asked == [[10, 11, 20, 21]]
    assert meeting.together([]) == []


def test_a_fault_is_raised_where_it_was_asked_for() -> None:
    meeting = doubling([])

    def careful(question: Any) -> Any:
        try:
            return meeting.ask(question)
        except ValueError as err:
            return f"caught {err}"

    assert meeting.together([partial(careful, "bad"), partial(careful, 4)]) == ["caught bad", 8]
    with pytest.raises(ValueError, match="bad"):
        meeting.together([partial(meeting.ask, "bad"), partial(meeting.ask, 1)])


def test_an_answer_that_fails_ends_all_calls_and_they_clean_up() -> None:
    cleaned: list[int] = []

    def fail(questions: list[Any]) -> list[Any]:
        raise RuntimeError("out of memory")

    meeting = Meeting(fail)

    def call(n: int) -> None:
        try:
            meeting.ask(n)
        finally:
            cleaned.append(n)

    with pytest.raises(RuntimeError, match="out of memory"):
        meeting.together([partial(call, n) for n in range(3)])
    assert cleaned == [0, 1, 2]


def test_ctrl_c_ends_a_call_whose_inner_calls_swallow_it() -> None:
    """A client's fault becomes an error reply; an interruption must not, or a round would end with half its clients."""
    went_on: list[int] = []

    def interrupted(questions: list[Any]) -> list[Any]:
        raise KeyboardInterrupt

    meeting = Meeting(interrupted)

    def client(n: int) -> str:
        try:
            meeting.ask(n)
        except BaseException:
            return "an error reply"
        return "an update"

    def run(n: int) -> None:
        meeting.together([partial(client, 1), partial(client, 2)])
        went_on.append(n)

    def settle() -> None:
        raise CancelledError(2)

    meeting._settle = settle  # type: ignore[method-assign]
    with pytest.raises(CancelledError):
        meeting.together([partial(run, n) for n in range(2)])
    assert went_on == []


def test_ctrl_c_reaches_every_call_and_no_new_one_starts() -> None:
    ended: list[str] = []
    started: list[int] = []

    def interrupted(questions: list[Any]) -> list[Any]:
        return questions

    meeting = Meeting(interrupted)

    def call(n: int) -> None:
        started.append(n)
        try:
            meeting.together([partial(meeting.ask, n), partial(meeting.ask, n)])
        except CancelledError:
            ended.append(f"cancelled {n}")
            raise

    plain = meeting._settle

    def settle() -> None:
        if len(started) == 2:
            raise CancelledError(2)
        plain()

    meeting._settle = settle  # type: ignore[method-assign]
    with pytest.raises(CancelledError):
        meeting.together([partial(call, n) for n in range(2)])
    assert sorted(ended) == ["cancelled 0", "cancelled 1"]
    assert meeting.stopped_by is None
    meeting._settle = plain  # type: ignore[method-assign]
    assert meeting.ask(3) == 3
