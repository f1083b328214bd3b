"""The client's side as a Flower ClientApp: the same one in this process, in simulation and on real nodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.config import Config
from fedtune.federation import messages
from fedtune.lora.state import to_tensors
from fedtune.methods.base import Method
from fedtune.models.adapter import AdaptedModel
from fedtune.training.local import OnStep, fit
from fedtune.training.workload import EncodedShards
from fedtune.types import DataError


@dataclass(frozen=True)
class Runtime:
    """What a client works with, resident as long as its process lives.

    Attributes:
        config: the run's settings.
        adapted: the base model with its adapter.
        method: its client half is used.
        shards: every client's examples.
        on_step: progress, called with (client, tokens, loss).
    """

    config: Config
    adapted: AdaptedModel
    method: Method
    shards: EncodedShards
    on_step: OnStep | None = None


def _train(runtime: Runtime, message: Message, context: Context) -> Message:
    order = message.content[messages.ORDER]
    if not isinstance(order, ConfigRecord):
        raise DataError("the training order is not a ConfigRecord")
    # a client never takes the server's word for which shard is its own
    client = int(str(context.node_config["partition-id"]))
    shard = runtime.shards.shards[client]
    if not shard:
        raise DataError(f"client {client} has no examples")
    record = message.content.array_records[messages.ADAPTER]
    # what is not sent is what this run's seed made it, on every client the same
    start = {**to_tensors(runtime.adapted.layout), **messages.unpack(record)}
    result = fit(
        runtime.adapted,
        shard,
        start,
        runtime.method,
        runtime.config,
        client,
        int(str(order["round"])),
        runtime.on_step,
    )
    metrics = {
        "examples": result.examples,
        "tokens": result.tokens,
        "steps": result.steps,
        "loss": result.loss,
    }
    near = messages.is_in_process(record)
    return Message(messages.train_answer(order, result.payload, metrics, in_process=near), reply_to=message)


def _query(runtime: Runtime, message: Message, context: Context) -> Message:
    client = int(str(context.node_config["partition-id"]))
    known = {"client": client, "examples": len(runtime.shards.shards[client])}
    return Message(RecordDict({messages.IDENTITY: ConfigRecord(dict(known))}), reply_to=message)


def client_app(runtime: Callable[[Context], Runtime]) -> ClientApp:
    """Build the ClientApp.

    Args:
        runtime: returns the process's resident runtime; called for every message, so it must keep it.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _train(runtime(context), message, context)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return _query(runtime(context), message, context)

    return app
