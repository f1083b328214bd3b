"""Generators that wait: one runs at a time, requests are answered together, and faults stay where they belong."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest

from fedtune.methods.requests import Features, Program, Request, handled
from fedtune.training.scheduler import Outcome, together
from fedtune.types import CancelledError

Asking = Generator[Any, Any, Any]


def doubling(asked: list[list[Any]]) -> Callable[[list[Any]], Sequence[Outcome[Any]]]:
    def answer(requests: list[Any]) -> Sequence[Outcome[Any]]:
        asked.append(list(requests))
        return [Outcome(error=ValueError(q)) if q == "bad" else Outcome(q * 2) for q in requests]

    return answer


def test_requests_are_answered_together_in_order() -> None:
    asked: list[list[Any]] = []

    def program(n: int) -> Asking:
        answers = []
        for step in range(n):
            answers.append((yield n + step))
        return answers

    outcomes = together([program(n) for n in (1, 3, 2)], doubling(asked))
    assert [o.result() for o in outcomes] == [[2], [6, 8, 10], [4, 6]]
    assert asked == [[1, 3, 2], [4, 3], [5]]
    assert together([], doubling(asked)) == []


def test_a_fault_is_raised_where_it_was_asked_for() -> None:
    def careful(request: Any) -> Asking:
        try:
            return (yield request)
        except ValueError as err:
            return f"caught {err}"

    def careless(request: Any) -> Asking:
        return (yield request)

    outcomes = together([careful("bad"), careful(4), careless("bad"), careless(1)], doubling([]))
    assert [o.value for o in outcomes] == ["caught bad", 8, None, 2]
    with pytest.raises(ValueError, match="bad"):
        outcomes[2].result()


def test_an_answer_that_fails_is_every_programs_fault_and_they_clean_up() -> None:
    cleaned: list[int] = []

    def fail(requests: list[Any]) -> Sequence[Outcome[Any]]:
        raise RuntimeError("out of memory")

    def program(n: int) -> Asking:
        try:
            return (yield n)
        finally:
            cleaned.append(n)

    for outcome in together([program(n) for n in range(3)], fail):
        with pytest.raises(RuntimeError, match="out of memory"):
            outcome.result()
    assert cleaned == [0, 1, 2]


def test_ctrl_c_reaches_every_program_and_none_goes_on() -> None:
    """A client's fault becomes an error reply; an interruption must not, or a round would end with half its clients."""
    ended: list[str] = []

    def interrupted(requests: list[Any]) -> Sequence[Outcome[Any]]:
        raise CancelledError(2)

    def client(n: int) -> Asking:
        try:
            return (yield n)
        except Exception:
            return "an error reply"

    def run(n: int) -> Asking:
        try:
            return together([client(1), client(2)], interrupted) if n else (yield n)
        except CancelledError:
            ended.append(f"cancelled {n}")
            raise
        finally:
            ended.append(f"cleaned {n}")

    with pytest.raises(CancelledError):
        together([run(0), run(1)], doubling([]))
    assert ended == ["cancelled 1", "cleaned 1", "cancelled 0", "cleaned 0"]


def test_a_program_that_clings_to_an_interruption_is_ended_all_the_same() -> None:
    def clinging() -> Asking:
        try:
            yield 1
        except BaseException:
            yield 2

    def interrupted(requests: list[Any]) -> Sequence[Outcome[Any]]:
        raise CancelledError(2)

    with pytest.raises(CancelledError):
        together([clinging(), clinging()], interrupted)


def test_a_program_is_charged_its_own_work_and_what_its_answers_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def program(own: float) -> Asking:
        now[0] += own
        yield own
        now[0] += own

    def answer(requests: list[float]) -> Sequence[Outcome[Any]]:
        now[0] += 10.0
        return [Outcome(r, seconds=2.5) for r in requests]

    outcomes = together([program(own) for own in (1.0, 2.0, 7.0, 0.0)], answer)
    assert [o.seconds for o in outcomes] == pytest.approx([4.5, 6.5, 16.5, 2.5])


def test_a_wrapped_program_may_catch_what_its_request_came_to() -> None:
    """Requests pass through `handled` on their way out; answers and faults come back to where they were made."""
    seen: list[Request] = []

    def program() -> Program[str]:
        try:
            yield Features(1)
        except ValueError as err:
            return f"{err}, then {(yield Features(2))}"
        return "no fault"

    def handle(request: Request) -> Program[Any]:
        seen.append(request)
        return (yield request)

    def answer(requests: list[Any]) -> Sequence[Outcome[Any]]:
        return [Outcome(error=ValueError("none")) if r.count == 1 else Outcome("two") for r in requests]

    assert [o.value for o in together([handled(program(), handle)], answer)] == ["none, then two"]
    assert seen == [Features(1), Features(2)]


def test_a_wrapped_program_that_is_dropped_is_closed() -> None:
    closed: list[bool] = []

    def program() -> Program[None]:
        try:
            yield Features(1)
        finally:
            closed.append(True)

    def handle(request: Request) -> Program[Any]:
        return (yield request)

    wrapped = handled(program(), handle)
    next(wrapped)
    wrapped.close()
    assert closed == [True]
