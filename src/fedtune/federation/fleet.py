"""Clients side by side on several devices, each with the base model resident; what is whose turn is decided by cost.

A fleet takes the clients of all runs under way (of one run, or of a sweep over methods, domains and seeds), the
costliest first, and gives each to the device that is free. Devices are Ray actors; tests use workers in this process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from flwr.app import Error, Message

from fedtune.federation.local import CLIENT_ERROR, LocalGrid
from fedtune.federation.messages import METRICS
from fedtune.training import lpt
from fedtune.training.meeting import Meeting
from fedtune.types import ConfigError, Problem

Make = Callable[[str], LocalGrid]


@dataclass(frozen=True)
class Task:
    """One client's message.

    Attributes:
        run: which run it is of; a worker knows its settings by this.
        message: to the client.
        cost: its tokens, or anything proportional to its time.
    """

    run: str
    message: Message
    cost: float


class Workers(Protocol):
    """Devices that answer one message at a time each."""

    count: int

    def prepare(self, run: str, recipe: Any) -> None:
        """Tell every worker how to make the runtime of a run."""
        ...

    def start(self, worker: int, task: Task) -> None:
        """Let a free worker begin a task."""
        ...

    def finished(self) -> tuple[int, Message]:
        """Wait for a worker to finish; return which, and its reply."""
        ...


class Fleet:
    """Gives tasks to workers.

    Args:
        workers: the devices.
    """

    size = 64

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self._meeting = Meeting(self._answer)
        self.busy: list[list[float]] = [[] for _ in range(workers.count)]

    @property
    def stopping(self) -> BaseException | None:
        """Why the runs under way are to end, if they are."""
        return self._meeting.stopped_by

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run whole runs at a time, so that the clients of all share the devices."""
        return self._meeting.together(calls)

    def replies(self, tasks: Sequence[Task]) -> list[Message]:
        """Return the reply to each task, in their order, whoever was done first."""
        done: list[Message] = self._meeting.ask(list(tasks))
        return done

    def _answer(self, questions: list[list[Task]]) -> list[list[Message]]:
        found = iter(self._work(list(chain.from_iterable(questions))))
        return [[next(found) for _ in tasks] for tasks in questions]

    def _work(self, tasks: Sequence[Task]) -> list[Message]:
        """Keep every worker busy until all tasks are done, the costliest first."""
        waiting, free = deque(lpt.order([t.cost for t in tasks])), deque(range(self.workers.count))
        doing: dict[int, int] = {}
        found: dict[int, Message] = {}
        while waiting or doing:
            while waiting and free:
                worker, place = free.popleft(), waiting.popleft()
                doing[worker] = place
                self.busy[worker].append(tasks[place].cost)
                self.workers.start(worker, tasks[place])
            worker, reply = self.workers.finished()
            found[doing.pop(worker)] = reply
            free.append(worker)
        return [found[i] for i in range(len(tasks))]


class FleetGrid(LocalGrid):
    """A grid whose clients live on a fleet's devices.

    Args:
        fleet: shared by all runs under way.
        run: this run's key.
        nodes: clients.
        costs: client -> cost of its round.
        on_reply: progress, called with each reply that is no error.
    """

    def __init__(
        self,
        fleet: Fleet,
        run: str,
        nodes: int,
        costs: Callable[[Message], float],
        on_reply: Callable[[Message], None] | None = None,
    ) -> None:
        super().__init__(_nobody, nodes)  # type: ignore[arg-type]
        self._fleet, self._key, self._costs, self._on_reply = fleet, run, costs, on_reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Answer all messages on the fleet; replies come in the order the messages were sent."""
        tasks = [Task(self._key, message, self._costs(message)) for message in messages]
        for reply in self._fleet.replies(tasks) if tasks else ():
            if self._on_reply and not reply.has_error() and METRICS in reply.content:
                self._on_reply(reply)
            yield reply


def _nobody(message: Message, context: Any) -> Message:
    raise NotImplementedError("this grid's clients live on its fleet")


class Answering:
    """What a worker does, wherever it lives: it makes each run's grid once and answers messages with it.

    Args:
        device: "cuda:0" or "cpu".
        make: builds a grid of resident clients from what `prepare` was told, on a device.
    """

    def __init__(self, device: str, make: Callable[[Any, str], LocalGrid]) -> None:
        self._device, self._make = device, make
        self._told: dict[str, Any] = {}
        self._grids: dict[str, LocalGrid] = {}

    def prepare(self, run: str, recipe: Any) -> None:
        """Remember how to make a run's grid."""
        self._told[run] = recipe

    def answer(self, run: str, message: Message) -> Message:
        """Answer one message; what goes wrong is an error reply."""
        try:
            if run not in self._grids:
                self._grids[run] = self._make(self._told[run], self._device)
            return next(iter(self._grids[run].send_and_receive([message])))
        except Exception as err:  # a device that cannot load the model must not take the run along
            return Message(Error(CLIENT_ERROR, f"{self._device}: {type(err).__name__}: {err}"), reply_to=message)


class RayWorkers:
    """One Ray actor a device.

    Args:
        devices: names; each "cuda:N" takes one GPU, "cpu" takes one CPU.
        make: see `Answering`.

    Raises:
        ConfigError: Ray is not installed.
    """

    def __init__(self, devices: Sequence[str], make: Callable[[Any, str], LocalGrid]) -> None:
        try:
            import ray
        except ImportError as err:
            problem = Problem("engine.devices", "needs Ray", "pip install 'fedtune[simulation]'")
            raise ConfigError("settings", [problem]) from err
        self._ray = ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        self._actors = [self._actor(device, make) for device in devices]
        self._doing: dict[Any, int] = {}
        self.count = len(self._actors)

    def _actor(self, device: str, make: Callable[[Any, str], LocalGrid]) -> Any:
        gpu = device.startswith("cuda")
        # Ray shows an actor only its own GPU, which is number 0 there
        share = {"num_gpus": 1, "num_cpus": 1} if gpu else {"num_cpus": 1}
        remote: Any = self._ray.remote
        return remote(**share)(Answering).remote("cuda" if gpu else device, make)

    def prepare(self, run: str, recipe: Any) -> None:
        """Tell every actor about a run."""
        self._ray.get([actor.prepare.remote(run, recipe) for actor in self._actors])

    def start(self, worker: int, task: Task) -> None:
        """Send a message to an actor."""
        self._doing[self._actors[worker].answer.remote(task.run, task.message)] = worker

    def finished(self) -> tuple[int, Message]:
        """Wait for any actor."""
        ready, _ = self._ray.wait(list(self._doing), num_returns=1)
        return self._doing.pop(ready[0]), self._ray.get(ready[0])

    def close(self) -> None:
        """End the actors, and Ray with them."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()


def costs_of(tokens: Mapping[int, float]) -> Callable[[Message], float]:
    """Return what tells a message's cost from the tokens of its client's step."""
    from fedtune.federation.messages import ORDER

    def cost(message: Message) -> float:
        return tokens[int(str(message.content.config_records[ORDER]["client"]))]

    return cost
