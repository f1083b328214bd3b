"""The client's side as a Flower ClientApp: the same one in this process and in a worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedtune.config import Config
from fedtune.federation import messages
from fedtune.federation.local import Client
from fedtune.federation.private import PrivateStore
from fedtune.lora.state import AdapterState
from fedtune.methods import Algorithm
from fedtune.models.adapted import AdaptedModel
from fedtune.training.client import LocalWork, OnStep
from fedtune.training.executor import Executor, Jobs, alone
from fedtune.training.workload import EncodedShards
from fedtune.types import DataError


@dataclass(frozen=True)
class Runtime:
    """What a client works with, resident as long as its process lives.

    Attributes:
        config: the run's settings.
        adapted: the base model with its adapter.
        algorithm: its client half is used.
        layout: the adapter as the run's seed made it.
        shards: every client's examples.
        executor: makes the optimiser steps.
        private: what clients keep to themselves.
        on_step: progress, called with (client, tokens, loss).
    """

    config: Config
    adapted: AdaptedModel
    algorithm: Algorithm
    layout: AdapterState
    shards: EncodedShards
    executor: Executor
    private: PrivateStore = field(default_factory=lambda: PrivateStore(None))
    on_step: OnStep | None = None


def _train(runtime: Runtime, message: Message, context: Context) -> Jobs[Message]:
    order = message.content[messages.ORDER]
    if not isinstance(order, ConfigRecord):
        raise DataError("the training order is not a ConfigRecord")
    # a client never takes the server's word for which shard is its own
    client = int(str(context.node_config["partition-id"]))
    shard = runtime.shards.shards[client]
    if not shard:
        raise DataError(f"client {client} has no examples")
    record = message.content.array_records[messages.ADAPTER]
    when = int(str(order["round"])), int(str(order["phase"]))
    algorithm, private = runtime.algorithm, runtime.private
    local = LocalWork(
        runtime.adapted,
        shard,
        algorithm.method.cut(runtime.layout, client),
        private.load(client, when),
        runtime.config,
        (client, *when),
        runtime.on_step,
        runtime.executor.limits.tokens,
    )
    fitted = yield from local.run(algorithm.work(local.context, messages.unpack(record)))
    if fitted.kept:
        private.save(client, when, fitted.kept)
    metrics = {"examples": local.examples, "tokens": local.tokens, "steps": len(local.losses_seen), "loss": local.loss}
    near = messages.is_in_process(record)
    return Message(messages.train_answer(order, fitted.payload, metrics, in_process=near), reply_to=message)


def _query(runtime: Runtime, message: Message, context: Context) -> Message:
    client = int(str(context.node_config["partition-id"]))
    known = {"client": client, "examples": len(runtime.shards.shards[client])}
    return Message(RecordDict({messages.IDENTITY: ConfigRecord(dict(known))}), reply_to=message)


def jobs(runtime: Runtime) -> Client:
    """Return what makes a client's answer to a message, for a grid that runs several clients together."""

    def answer(message: Message, context: Context) -> Jobs[Message]:
        if message.metadata.message_type == MessageType.QUERY:
            return _query(runtime, message, context)
        return (yield from _train(runtime, message, context))

    return answer


def client_app(runtime: Callable[[Context], Runtime]) -> ClientApp:
    """Build the ClientApp: each message is answered on its own.

    Args:
        runtime: returns the process's resident runtime; called for every message, so it must keep it.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        own = runtime(context)
        return alone(_train(own, message, context), own.executor)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return _query(runtime(context), message, context)

    return app
