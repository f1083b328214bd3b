"""A pool of workers, one for each device, each with the base model resident: longest processing time first.

The pool takes the clients of all runs under way (of one run, or of a sweep over methods, domains and seeds), the
costliest first, and gives each to a free worker: at most 4/3 of the best schedule (Graham 1969). Workers are the Ray
actors of Flower's simulation engine (`simulation.py`); tests use workers in this process.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from flwr.app import Context, Error, Message

from fedtune.federation.local import CLIENT_ERROR, LocalGrid, answer_to
from fedtune.federation.messages import ORDER
from fedtune.federation.pool import Replies
from fedtune.training.executor import Jobs

RUN = "run"
AT_ONCE = 16


@dataclass(frozen=True)
class WorkerCall:
    """One client's message.

    Attributes:
        message: to the client.
        context: the client's; its run config says which run it is of, and a worker knows the settings by this.
        cost: its tokens, or anything proportional to its time.
        limit: seconds it may take once a device has begun it; None for any. Waiting for a device is nobody's fault.
    """

    message: Message
    context: Context
    cost: float
    limit: float | None = None

    @property
    def run(self) -> str:
        """Which run it is of."""
        return str(self.context.run_config[RUN])


class Workers(Protocol):
    """Devices that answer one message at a time each."""

    count: int

    def prepare(self, run: str, spec: Any) -> None:
        """Let every worker know what it needs to make a run's clients."""
        ...

    def release(self, run: str) -> None:
        """Forget a run that is over."""
        ...

    def start(self, worker: int, task: WorkerCall) -> None:
        """Let a free worker begin a task."""
        ...

    def finished(self, timeout: float | None = None) -> tuple[int, Message | Exception] | None:
        """Wait for a worker to finish; return which, and its reply, or what went wrong; None if none does in time."""
        ...

    def abandon(self, worker: int) -> None:
        """Stop a worker in the middle of its task, and have another in its place."""
        ...


class WorkerPool:
    """Gives calls to workers.

    Args:
        workers: the devices.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self.busy: list[list[float]] = [[] for _ in range(workers.count)]

    @property
    def size(self) -> int:
        """How many tasks of a run are worth giving at a time; no more orders and replies of it are held at once."""
        return max(AT_ONCE, 4 * self.workers.count)

    def answer(self, batches: Sequence[Sequence[WorkerCall]]) -> list[Replies]:
        """Return the reply to each task, in their order, whoever was done first; None where one took too long."""
        found = iter(self._work(list(chain.from_iterable(batches))))
        return [[next(found) for _ in tasks] for tasks in batches]

    def _work(self, tasks: Sequence[WorkerCall]) -> list[Message | None]:
        """Keep every worker busy until all tasks are done or have taken too long, the costliest first."""
        waiting = deque(sorted(range(len(tasks)), key=lambda place: -tasks[place].cost))
        free = deque(range(self.workers.count))
        doing: dict[int, tuple[int, float]] = {}
        found: dict[int, Message] = {}
        while waiting or doing:
            while waiting and free:
                worker, place = free.popleft(), waiting.popleft()
                limit = tasks[place].limit
                doing[worker] = place, math.inf if limit is None else time.monotonic() + limit
                self.busy[worker].append(tasks[place].cost)
                self.workers.start(worker, tasks[place])
            done = self.workers.finished(_time_left(due for _, due in doing.values()))
            if done is not None:
                worker, reply = done
                place, _ = doing.pop(worker)
                found[place] = _checked(tasks[place], reply)
                free.append(worker)
            for worker in [w for w, (_, due) in doing.items() if time.monotonic() > due]:
                self.workers.abandon(worker)
                del doing[worker]
                free.append(worker)
        return [found.get(i) for i in range(len(tasks))]


def _time_left(due: Iterable[float]) -> float | None:
    """Return the seconds until the first of some times; None where none ever comes."""
    first = min(due)
    return None if first == math.inf else max(0.0, first - time.monotonic()) + 0.01


def _checked(task: WorkerCall, reply: Message | Exception) -> Message:
    """Return a client's reply; an error where its device failed, or it is no answer to what the client was sent."""
    try:
        if isinstance(reply, Exception):
            raise reply
        return answer_to(task.message, reply)
    except Exception as err:  # that must not take the run along
        return Message(Error(CLIENT_ERROR, f"{type(err).__name__}: {err}"), reply_to=task.message)


class WorkerGrid(LocalGrid):
    """A grid whose clients live in workers; what they change in their Flower context is not brought back.

    Some clients' messages are made, sent and answered at a time, so that neither all orders nor all replies of a large
    cohort are ever held at once.

    Args:
        workers: the pool, shared by all runs under way.
        run: this run's key.
        nodes: clients.
        costs: client -> cost of its round.
        on_reply: progress, called with each reply that is no error.
    """

    def __init__(
        self,
        workers: WorkerPool,
        run: str,
        nodes: int,
        costs: Callable[[Message], float],
        on_reply: Callable[[Message], None] | None = None,
    ) -> None:
        super().__init__(_nobody, nodes, {RUN: run}, workers)
        self._costs, self._on_reply = costs, on_reply

    def _calls(self, messages: Sequence[Message], timeout: float | None) -> Sequence[WorkerCall]:
        """Return the pool's calls; a client's seconds count from when a worker begins it."""
        return [WorkerCall(m, self._context(m.metadata.dst_node_id), self._costs(m), timeout) for m in messages]

    def _heard(self, replies: Replies) -> Iterator[Message]:
        for reply in super()._heard(replies):
            if self._on_reply and isinstance(reply, Message) and not reply.has_error():
                self._on_reply(reply)
            yield reply


def _nobody(message: Message, context: Context) -> Jobs[Message]:
    raise NotImplementedError("this grid's clients live in its workers")


def costs_of(tokens: Mapping[int, float]) -> Callable[[Message], float]:
    """Return what tells a message's cost from the tokens of its client's step."""

    def cost(message: Message) -> float:
        return tokens[int(str(message.content.config_records[ORDER]["client"]))]

    return cost
