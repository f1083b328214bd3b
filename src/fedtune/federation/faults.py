"""Simulated faults by a seeded plan, around any Grid: dropouts, stragglers, clients that fail."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.config.schema import FaultSettings
from fedtune.federation.messages import ORDER
from fedtune.federation.pool import Steps, complete, exchange
from fedtune.types import derive_seed

Fault = Literal["", "dropout", "straggler", "error"]
KILL_VARIABLE = "FEDTUNE_KILL_AT"


def planned(faults: FaultSettings, seed: int, round_: int, client: int, phase: int = 1) -> Fault:
    """Return the fault of one client call; a pure function, so a resumed run meets the same ones.

    Where a round has several exchanges each is a call of its own: a client may be lost between them.
    """
    later = (phase,) if phase > 1 else ()
    draw = random.Random(derive_seed(seed, "fault", round_, client, *later)).random()
    if draw < faults.dropout:
        return "dropout"
    if draw < faults.dropout + faults.straggler:
        return "straggler"
    return "error" if draw < faults.dropout + faults.straggler + faults.error else ""


def kill_point(round_: int, phase: str) -> None:
    """Die by SIGKILL if the environment says `FEDTUNE_KILL_AT=round:phase`; crash tests use it."""
    if os.environ.get(KILL_VARIABLE) == f"{round_}:{phase}":
        os.kill(os.getpid(), signal.SIGKILL)


class FaultyGrid(Grid):
    """A grid on which clients fail by plan.

    A dropout never sees its message. A straggler works (and keeps what it keeps), but its reply comes after the
    deadline: it is thrown away. An error is an error reply.
    """

    def __init__(self, grid: Grid, faults: FaultSettings, seed: int) -> None:
        self._grid = grid
        self._faults = faults
        self._seed = seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grid, name)

    def set_run(self, run: Any) -> None:
        """Set the run of the grid inside."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Run information of the grid inside."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message on the grid inside."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the grid inside."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push on the grid inside, without faults."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull from the grid inside, without faults."""
        return self._grid.pull_messages(message_ids)

    def _fault(self, message: Message) -> Fault:
        order: Any = message.content.get(ORDER)
        if not order:
            return ""
        return planned(self._faults, self._seed, *(int(order[key]) for key in ("round", "client", "phase")))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send to the clients that can be reached; return the replies in time, and errors for those that fail."""
        replies: list[Message] = []
        complete(self.exchange(messages, replies.append, timeout))
        return iter(replies)

    def exchange(
        self, messages: Iterable[Message], take: Callable[[Message], None], timeout: float | None = None
    ) -> Steps[None]:
        """Do the same as a step of a run."""
        failed: list[Message] = []
        late: set[int] = set()

        def reached() -> Iterator[Message]:
            for message in messages:
                fault = self._fault(message)
                if fault == "error":
                    failed.append(message)
                if fault == "straggler":
                    late.add(message.metadata.dst_node_id)
                if fault in ("", "straggler"):
                    yield message

        def in_time(reply: Message) -> None:
            if reply.metadata.src_node_id not in late:
                take(reply)

        yield from exchange(self._grid, reached(), in_time, timeout)
        for message in failed:
            take(Message(Error(5, "simulated client error"), reply_to=message))
