"""A cooperative scheduler: generators run until each has made a request; pending requests are answered as one batch.

One runs at a time, always in the same order, so there is nothing to lock. It serves clients, whose optimiser steps
share a pass, and the runs of a sweep, whose clients share a model.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Q = TypeVar("Q")


@dataclass
class Outcome(Generic[T]):
    """What a request or a generator came to: a value or an exception, and the seconds it took of its own."""

    value: T | None = None
    error: Exception | None = None
    seconds: float = 0.0

    def result(self) -> T:
        """Return the value, or raise the exception."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


def attempted(call: Callable[[], T]) -> Outcome[T]:
    """Call something; return what it came to, and the seconds it took."""
    since, outcome = time.monotonic(), Outcome[T]()
    try:
        outcome.value = call()
    except Exception as err:
        outcome.error = err
    outcome.seconds = time.monotonic() - since
    return outcome


class _Running(Generic[Q, T]):
    """A generator with its pending request."""

    def __init__(self, program: Generator[Q, Any, T]) -> None:
        self.program = program
        self.outcome: Outcome[T] = Outcome()
        self.pending: list[Q] = []

    def resume(self, answer: Outcome[Any] | None = None) -> None:
        """Let it run until it makes a request or ends."""
        answer, since = answer or Outcome(), time.monotonic()
        self.pending = []
        try:
            request = self.program.throw(answer.error) if answer.error else self.program.send(answer.value)
            self.pending = [request]
        except StopIteration as done:
            self.outcome.value = done.value
        except Exception as err:  # of this one alone
            self.outcome.error = err
        self.outcome.seconds += answer.seconds + time.monotonic() - since

    def end(self, reason: BaseException) -> None:
        """Raise an interruption where it waits, so that it cleans up."""
        if self.pending:
            with contextlib.suppress(BaseException):
                self.program.throw(reason)
        self.program.close()


def together(
    programs: Sequence[Generator[Q, Any, T]], answer: Callable[[list[Q]], Sequence[Outcome[Any]]]
) -> list[Outcome[T]]:
    """Run generators to their ends and return what each came to, in order.

    Args:
        programs: not started yet.
        answer: given the pending requests of several generators, in their order, returns an answer for each.

    Raises:
        BaseException: an interruption (no `Exception`), after every generator has been told and has cleaned up.
    """
    running = [_Running(program) for program in programs]
    try:
        for one in running:
            one.resume()
        while pending := [one for one in running if one.pending]:
            try:
                answers = answer([one.pending[0] for one in pending])
            except Exception as err:  # raised where each request was made
                answers = [Outcome(error=err) for _ in pending]
            for one, found in zip(pending, answers, strict=True):
                one.resume(found)
    except BaseException as reason:
        for one in reversed(running):
            one.end(reason)
        raise
    return [one.outcome for one in running]
