"""A Flower Grid in this process: no Ray, no daemon, nothing serialised, deterministic."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.federation.messages import FALSE_REPLY
from fedtune.types import plain

SERVER_NODE = 1
FIRST_NODE = 2
CLIENT_ERROR = 5
DEFAULT_TTL = 43_200.0


def _identify_task() -> None:
    """Give this process the task identity that Flower's own strategies need to make messages, if it has none."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:  # before 1.38 there was none, and it was not needed
        return
    try:
        TaskIdentity.task_id  # noqa: B018  # raises where none is set
    except RuntimeError:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SERVER_NODE


def answer_to(message: Message, reply: Any) -> Message:
    """Return a node's reply to a message, or an error in its place where it is none or another node's or message's.

    A wire would not bring such a reply. Its node has answered all the same, with something false.
    """
    asked, flaw = message.metadata, ""
    if not isinstance(reply, Message):
        flaw = f"{type(reply).__name__} in place of a reply"
    elif (said := reply.metadata).src_node_id != asked.dst_node_id:
        flaw = f"a reply of node {asked.dst_node_id} that names node {said.src_node_id} as its sender"
    elif said.reply_to_message_id != asked.message_id:
        flaw = f"a reply to message {said.reply_to_message_id!r}; asked was {asked.message_id!r}"
    return Message(Error(FALSE_REPLY, plain(flaw)), reply_to=message) if flaw else reply


class Crew(Protocol):
    """Runs calls, `size` of them at a time at best, and returns their results in order."""

    @property
    def size(self) -> int:
        """How many calls are worth running together."""
        ...

    def together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run calls and return their results in order."""
        ...

    def clock(self) -> float:
        """Return seconds, of which differences count: inside a call only those of its own work."""
        ...


class LocalGrid(Grid):
    """Calls a ClientApp directly, one node for each client; any Flower strategy or ClientApp runs on it.

    Node `FIRST_NODE + i` has partition i. A client's state lives as long as the grid. Messages are
    answered in the order they were sent, so a run is the same every time.

    Args:
        client_app: what every node runs.
        nodes: how many.
        run_config: given to every client's context.
        crew: runs some clients' calls together; one after the other by default.
    """

    in_process = True

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        run_config: dict[str, Any] | None = None,
        crew: Crew | None = None,
    ) -> None:
        self._app = client_app
        self._nodes = nodes
        self._run_config = run_config or {}
        self._crew = crew
        # Flower's Run class moves between versions; only its id is needed
        self._run: Any = SimpleNamespace(run_id=1)
        self._contexts: dict[int, Context] = {}
        self._replies: dict[str, Message] = {}
        self._ids = itertools.count(1)
        _identify_task()

    def set_run(self, run: Any) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Any:
        """Run information."""
        return self._run

    def partition_ids(self) -> dict[int, int]:
        """Return node id -> partition, without asking the nodes."""
        return {FIRST_NODE + i: i for i in range(self._nodes)}

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message from the server to a node."""
        metadata = Metadata(
            run_id=self._run.run_id,
            message_id=f"local-{next(self._ids)}",
            src_node_id=SERVER_NODE,
            dst_node_id=dst_node_id,
            reply_to_message_id="",
            group_id=group_id,
            created_at=time.time(),
            ttl=ttl or DEFAULT_TTL,
            message_type=message_type,
        )
        # Flower's own way to make a message outside a running task; its overloads leave it out
        build: Any = Message
        made: Message = build(metadata=metadata, content=content)
        return made

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes."""
        return range(FIRST_NODE, FIRST_NODE + self._nodes)

    def _context(self, node: int) -> Context:
        if node not in self._contexts:
            config: dict[str, Any] = {"partition-id": node - FIRST_NODE, "num-partitions": self._nodes}
            self._contexts[node] = Context(self._run.run_id, node, config, RecordDict(), self._run_config)
        return self._contexts[node]

    def _answer(self, message: Message) -> Message:
        """Run the client; an exception becomes an error reply with its traceback, as over a wire."""
        if not message.metadata.message_id:
            message.metadata.__dict__["_message_id"] = f"local-{next(self._ids)}"
        try:
            return answer_to(message, self._app(message, self._context(message.metadata.dst_node_id)))
        except (Exception, SystemExit):  # a client that calls exit() ends itself and not the run
            reason = plain(traceback.format_exc(limit=-4))
            return Message(Error(CLIENT_ERROR, reason), reply_to=message)

    def _in_time(self, message: Message, timeout: float | None) -> Message | None:
        """Return a client's reply; None if it took longer than it may."""
        clock = self._crew.clock if self._crew else time.monotonic
        start, reply = clock(), self._answer(message)
        return None if timeout is not None and clock() - start > timeout else reply

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer messages at once and keep the replies until they are pulled."""
        ids = []
        for message in messages:
            self._replies[message.metadata.message_id] = self._answer(message)
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Answer messages one after the other, or a crew's size at a time; replies go on before the next ones start.

        A timeout is each client's own, as if all had worked at the same time on machines of their own: the reply of
        one that works longer is lost, and nobody else's.
        """
        waiting = iter(messages)
        size = self._crew.size if self._crew else 1
        while some := list(itertools.islice(waiting, size)):
            calls = [partial(self._in_time, message, timeout) for message in some]
            replies = self._crew.together(calls) if self._crew else [calls[0]()]
            yield from (reply for reply in replies if reply is not None)
