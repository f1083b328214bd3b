"""What answers messages: some clients at a time, of one run or of several that share a model or devices.

A run is a generator that yields batches of messages and is resumed with the replies; so the clients of several runs
can be answered as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeVar

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.training.executor import Executor, Jobs, Work
from fedtune.training.scheduler import Outcome, together

T = TypeVar("T")
Replies = list[Message | None]


class Pool(Protocol):
    """Answers messages; whatever it needs to do so is in its calls."""

    @property
    def size(self) -> int:
        """How many calls are worth making together."""
        ...

    def answer(self, batches: Sequence[Sequence[Any]]) -> list[Replies]:
        """Make the calls of several batches; return each one's replies, None where a client took too long."""
        ...


@dataclass(frozen=True)
class Batch:
    """What a run waits for: calls of a pool."""

    pool: Pool
    calls: Sequence[Any]


Steps = Generator[Batch, Replies, T]


def _replies(batches: list[Batch]) -> list[Outcome[Replies]]:
    """Answer the batches of several runs, those of one pool together."""
    found: dict[int, Outcome[Replies]] = {}
    for pool in {id(b.pool): b.pool for b in batches}.values():
        mine = [i for i, b in enumerate(batches) if b.pool is pool]
        found |= zip(mine, map(Outcome, pool.answer([batches[i].calls for i in mine])), strict=True)
    return [found[i] for i in range(len(batches))]


def finish(runs: Sequence[Steps[T]]) -> list[Outcome[T]]:
    """Run some runs to their ends, their clients in shared batches, and return what each came to."""
    return together(runs, _replies)


def complete(run: Steps[T]) -> T:
    """Run one run to its end, beside no other."""
    return finish([run])[0].result()


def exchange(
    grid: Grid, messages: Iterable[Message], take: Callable[[Message], None], timeout: float | None = None
) -> Steps[None]:
    """Send messages to a grid's nodes and take each reply that comes in time; a foreign grid blocks meanwhile."""
    own = getattr(grid, "exchange", None)
    if own is not None:
        yield from own(messages, take, timeout)
        return
    for reply in grid.send_and_receive(messages, timeout=timeout):
        take(reply)


@dataclass(frozen=True)
class Call:
    """One client's job in this process, and the seconds it may take."""

    job: Jobs[Message]
    limit: float | None = None


class LocalPool:
    """Runs clients in this process, as many together as the executor trains in a pass.

    A limit is each client's own, as if all had worked at the same time on machines of their own.

    Args:
        executor: makes the optimiser steps that jobs ask for; None where they ask for none.
    """

    def __init__(self, executor: Executor | None = None) -> None:
        self.executor = executor
        self.size = executor.size if executor else 1

    def answer(self, batches: Sequence[Sequence[Call]]) -> list[Replies]:
        """Run all jobs together; the reply of one that worked longer than it may is lost, and nobody else's."""
        outcomes = iter(together([c.job for c in chain.from_iterable(batches)], self._trained))
        return [[_in_time(call, next(outcomes)) for call in batch] for batch in batches]

    def _trained(self, works: list[Work]) -> Sequence[Outcome[Any]]:
        if self.executor is None:
            raise TypeError("a client asks for optimiser steps, and this grid was made without an executor")
        return self.executor.run_all(works)


def _in_time(call: Call, outcome: Outcome[Message]) -> Message | None:
    return None if call.limit is not None and outcome.seconds > call.limit else outcome.result()
