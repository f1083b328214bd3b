"""A Flower Grid in this process: no Ray, no daemon, nothing serialised, deterministic."""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.federation.messages import FALSE_REPLY
from fedtune.federation.pool import Batch, Call, LocalPool, Pool, Replies, Steps
from fedtune.training.executor import Jobs
from fedtune.types import plain

Client = Callable[[Message, Context], Jobs[Message]]
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
    asked, problem = message.metadata, ""
    if not isinstance(reply, Message):
        problem = f"{type(reply).__name__} in place of a reply"
    elif (said := reply.metadata).src_node_id != asked.dst_node_id:
        problem = f"a reply of node {asked.dst_node_id} that names node {said.src_node_id} as its sender"
    elif said.reply_to_message_id != asked.message_id:
        problem = f"a reply to message {said.reply_to_message_id!r}; asked was {asked.message_id!r}"
    return Message(Error(FALSE_REPLY, plain(problem)), reply_to=message) if problem else reply


def _at_once(app: ClientApp) -> Client:
    """Return a ClientApp's answers as jobs that ask for nothing."""

    def answer(message: Message, context: Context) -> Jobs[Message]:
        yield from ()
        return app(message, context)

    return answer


class LocalGrid(Grid):
    """Calls a ClientApp directly, one node for each client; any Flower strategy or ClientApp runs on it.

    Node `FIRST_NODE + i` has partition i. A client's state lives as long as the grid. Messages are
    answered in the order they were sent, so a run is the same every time.

    Args:
        clients: what every node runs: a ClientApp, or what makes jobs.
        nodes: how many.
        run_config: given to every client's context.
        pool: answers some clients' messages together; one after the other by default.
    """

    in_process = True

    def __init__(
        self,
        clients: ClientApp | Client,
        nodes: int,
        run_config: dict[str, Any] | None = None,
        pool: Pool | None = None,
    ) -> None:
        self._client = _at_once(clients) if isinstance(clients, ClientApp) else clients
        self._nodes = nodes
        self._run_config = run_config or {}
        self.pool = pool or LocalPool()
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

    def _job(self, message: Message) -> Jobs[Message]:
        """Run the client; an exception becomes an error reply with its traceback, as over a wire."""
        if not message.metadata.message_id:
            message.metadata.__dict__["_message_id"] = f"local-{next(self._ids)}"
        try:
            reply = yield from self._client(message, self._context(message.metadata.dst_node_id))
            return answer_to(message, reply)
        except (Exception, SystemExit):  # a client that calls exit() ends itself and not the run
            reason = plain(traceback.format_exc(limit=-4))
            return Message(Error(CLIENT_ERROR, reason), reply_to=message)

    def _calls(self, messages: Sequence[Message], timeout: float | None) -> Sequence[Any]:
        """Return what the pool is to do."""
        return [Call(self._job(message), timeout) for message in messages]

    def _heard(self, replies: Replies) -> Iterator[Message]:
        """Yield the replies that came in time."""
        return (reply for reply in replies if reply is not None)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer messages at once and keep the replies until they are pulled."""
        sent = list(messages)
        replies = self.pool.answer([self._calls(sent, None)])[0]
        ids = [message.metadata.message_id for message in sent]
        self._replies |= {i: reply for i, reply in zip(ids, replies, strict=True) if reply is not None}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that are there, once."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Answer messages, as many together as the pool takes; replies go on before the next ones start.

        A timeout is each client's own, as if all had worked at the same time on machines of their own: the reply of
        one that works longer is lost, and nobody else's.
        """
        waiting = iter(messages)
        while some := list(itertools.islice(waiting, self.pool.size)):
            yield from self._heard(self.pool.answer([self._calls(some, timeout)])[0])

    def exchange(
        self, messages: Iterable[Message], take: Callable[[Message], None], timeout: float | None = None
    ) -> Steps[None]:
        """Do the same as a step of a run, beside which other runs may wait for theirs."""
        waiting = iter(messages)
        while some := list(itertools.islice(waiting, self.pool.size)):
            for reply in self._heard((yield Batch(self.pool, self._calls(some, timeout)))):
                take(reply)
