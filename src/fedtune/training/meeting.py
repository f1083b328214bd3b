"""Calls that run one at a time, each until it asks for something; what all have asked for is then done at once.

Methods are plain code that says "train this now" in the middle. Here each client's call has a thread of its own, but
never do two of them run at the same time: there is nothing to lock, and the order is always the same.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class _Caller:
    """A call with its thread: it runs when told to go, and says when it stops (asking, waiting, or done)."""

    call: Callable[[], Any]
    parent: _Caller | None = None
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    ready: bool = True
    done: bool = False
    asked: Any = None
    answer: Any = None
    error: BaseException | None = None
    children: list[_Caller] = field(default_factory=list)
    spent: float = 0.0
    since: float = 0.0

    def outcome(self) -> Any:
        """Return what the call, or its last question, came to, or raise what went wrong."""
        error, self.error = self.error, None
        if error is not None:
            raise error
        return self.answer


class Meeting:
    """Where calls meet.

    Args:
        answer: given what several calls have asked for, in their order, returns an answer for each; one that is an
            exception is raised where it was asked.
        seconds: given the same questions after they were answered, returns what each took; equal shares by default.
    """

    def __init__(
        self,
        answer: Callable[[list[Any]], Sequence[Any]],
        seconds: Callable[[list[Any]], Sequence[float]] | None = None,
    ) -> None:
        self._answer, self._seconds = answer, seconds
        self._stopped = threading.Semaphore(0)
        self._callers: list[_Caller] = []
        self._current: _Caller | None = None
        self.stopped_by: BaseException | None = None

    def ask(self, question: Any) -> Any:
        """Ask from inside a call; outside of any, the question is answered on the spot."""
        caller = self._current
        if caller is None:
            return _raised(self._answer([question])[0])
        caller.asked = question
        self._pause(caller)
        return caller.outcome()

    def clock(self) -> float:
        """Return seconds, of which differences count: inside a call only its own work, and its share of the joint."""
        caller, now = self._current, time.monotonic()
        return now if caller is None else caller.spent + now - caller.since

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run calls and return their results in order; may be used inside a call, whose meeting the new ones join.

        Raises:
            BaseException: the first call's that failed, when all have ended.
        """
        parent = self._current
        own = [_Caller(call, parent) for call in calls]
        self._callers += own
        for caller in own:
            threading.Thread(target=self._live, args=(caller,), daemon=True).start()
        if parent is None:
            self._preside()
        elif own:
            parent.children = own
            self._pause(parent)
            parent.outcome()  # what ends the meeting ends the parent, whatever its calls have made of it
        return [caller.outcome() for caller in own]

    def _live(self, caller: _Caller) -> None:
        caller.go.acquire()
        try:
            caller.answer = caller.outcome() if caller.error else caller.call()
        except BaseException as err:  # handed on to whoever waits for the result
            caller.error = err
        caller.done, caller.ready = True, False
        self._stopped.release()

    def _pause(self, caller: _Caller) -> None:
        caller.ready = False
        self._stopped.release()
        caller.go.acquire()

    def _preside(self) -> None:
        """Let every call go on that can; then answer what was asked; until all are done."""
        try:
            while self._callers:
                while ready := [c for c in self._callers if c.ready]:
                    for caller in ready:
                        self._let(caller)
                self._callers = [c for c in self._callers if not c.done]
                self._settle()
        except BaseException as err:  # Ctrl-C: every call is told where it asks next, and cleans up
            self._abandon(err)
            raise

    def _abandon(self, err: BaseException) -> None:
        """End all calls, the inner ones first; the one that is running ends when it next asks or looks."""
        self.stopped_by = err
        if self._current is not None:
            self._stopped.acquire()
            self._current = None
        for caller in reversed(self._callers):
            while not caller.done:
                caller.error, caller.asked, caller.children = err, None, []
                self._let(caller)
        self._callers, self.stopped_by = [], None

    def _let(self, caller: _Caller) -> None:
        self._current, caller.since = caller, time.monotonic()
        caller.go.release()
        self._stopped.acquire()
        self._current, caller.spent = None, caller.spent + time.monotonic() - caller.since
        parent = caller.parent
        if caller.done and parent is not None and all(c.done for c in parent.children):
            parent.children, parent.ready = [], True

    def _settle(self) -> None:
        asking = [c for c in self._callers if c.asked is not None]
        if not asking:
            return
        since, questions = time.monotonic(), [c.asked for c in asking]
        try:
            answers = list(self._answer(questions))
        except BaseException as err:  # every call learns of it, cleans up and ends
            answers = [err] * len(asking)
        equal = (time.monotonic() - since) / len(asking)
        spent = self._seconds(questions) if self._seconds else [equal] * len(asking)
        for caller, found, own in zip(asking, answers, spent, strict=True):
            caller.spent += own
            caller.asked, caller.ready = None, True
            caller.error = found if isinstance(found, BaseException) else None
            caller.answer = None if caller.error else found


def _raised(answer: Any) -> Any:
    if isinstance(answer, BaseException):
        raise answer
    return answer
