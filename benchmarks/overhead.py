"""What the engine costs beside the training, in this process and in Flower's Ray simulation.

First the messages alone: clients that send back what they got. Then rounds of clients that add 1, aggregated: Flower's
FedAvg in Ray and in this process, and fedtune's own loop, which also screens every reply. There are 120 arrays, 7.4 MB
in all, as in SmolLM2-135M's adapter of rank 32.
"""

from __future__ import annotations

import os
import time
from typing import Any

for _name in ("FLWR_TELEMETRY_ENABLED", "FLWR_TELEMETRY_LOGGING"):
    os.environ.setdefault(_name, "0")
for _name in ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"):
    os.environ.setdefault(_name, "1")

from pathlib import Path  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402

import numpy as np  # noqa: E402
import ray as _ray  # noqa: E402,F401  # tells at once where it is missing
import torch  # noqa: E402
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict  # noqa: E402
from flwr.clientapp import ClientApp  # noqa: E402
from flwr.serverapp import Grid, ServerApp  # noqa: E402
from flwr.serverapp.strategy import FedAvg  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402

from fedtune import methods  # noqa: E402
from fedtune.federation import checkpoint, messages  # noqa: E402
from fedtune.federation.checkpoint import Progress  # noqa: E402
from fedtune.federation.local import LocalGrid  # noqa: E402
from fedtune.federation.nodes import connect  # noqa: E402
from fedtune.federation.pool import complete  # noqa: E402
from fedtune.federation.rounds import Federation, one_round  # noqa: E402
from fedtune.lora.state import LoraModule  # noqa: E402
from fedtune.methods import ServerState  # noqa: E402
from fedtune.settings import load  # noqa: E402

SHAPES = [(32, 576), (576, 32), (32, 576), (192, 32)] * 30


def start() -> ArrayRecord:
    """Return the arrays that are sent."""
    return ArrayRecord([np.zeros(shape, np.float32) for shape in SHAPES])


def client() -> ClientApp:
    """Return a client that adds 1."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = [a + 1 for a in message.content["arrays"].to_numpy_ndarrays()]
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)

    return app


class Timed(FedAvg):
    """FedAvg that notes when each round begins."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.moments: list[float] = []

    def configure_train(self, *words: Any, **named: Any) -> Any:
        self.moments.append(time.perf_counter())
        return super().configure_train(*words, **named)

    def seconds(self) -> list[float]:
        """Return the time between the beginnings of rounds; the first round, which warms up, is left out."""
        return [b - a for a, b in zip(self.moments[1:], self.moments[2:], strict=False)]


def _strategy() -> Timed:
    return Timed(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)


def _check(result: Any, rounds: int) -> None:
    arrays = result.arrays.to_numpy_ndarrays()
    assert all(np.allclose(a, rounds) for a in arrays), "the clients' work did not arrive"


def same_strategy(clients: int, rounds: int) -> list[float]:
    """Return seconds a round of Flower's own strategy in this process; its arrays are bytes here too."""
    strategy = _strategy()
    _check(strategy.start(grid=LocalGrid(client(), clients), initial_arrays=start(), num_rounds=rounds + 2), rounds + 2)
    return strategy.seconds()


def _adding() -> ClientApp:
    """Return the same client for fedtune's loop. It adds 0.5: 1 in every number is more than a round accepts."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        tensors = {n: t + 0.5 for n, t in messages.unpack(message.content.array_records[messages.ADAPTER]).items()}
        order = message.content.config_records[messages.ORDER]
        answer = messages.train_answer(order, tensors, {"examples": 1, "loss": 0.0}, in_process=True)
        return Message(answer, reply_to=message)

    return app


def ours(clients: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return seconds a round of fedtune's own loop, screening and aggregation included, and of its checkpoint."""
    config = load([{"domain": "finance", "federation": {"clients": clients}}]).config
    factors = zip(SHAPES[::2], SHAPES[1::2], strict=True)
    adapter = {f"layer.{i}": LoraModule(torch.zeros(a), torch.zeros(b), 64.0) for i, (a, b) in enumerate(factors)}
    engine, saving = [], []
    with TemporaryDirectory() as folder:
        grid = LocalGrid(_adding(), clients)
        registered = dict.fromkeys(range(clients), 1)
        fed = Federation(config, methods.create(config), grid, registered, "run", Path(folder))
        fed.nodes.update(connect(grid, clients, 1.0))
        fed.places.update({c: n for n, c in fed.nodes.items()})
        progress = Progress(ServerState(adapter))
        for round_ in range(1, rounds + 2):
            began = time.perf_counter()
            progress = complete(one_round(fed, round_, progress))
            middle = time.perf_counter()
            checkpoint.save(fed.folder, progress, "run", 2)
            engine.append(middle - began)
            saving.append(time.perf_counter() - middle)
    assert all(bool((m.a == (rounds + 1) / 2).all()) for m in progress.state.adapter.values())
    return engine[1:], saving[1:]


def echoing() -> ClientApp:
    """Return a client that sends back what it got."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": message.content["arrays"]}), reply_to=message)

    return app


def our_calls(clients: int, rounds: int) -> list[float]:
    """Return seconds to send a message to every client and have its answer, tensors in and tensors out."""
    tensors = {f"{i}.lora_A.weight": torch.zeros(shape) for i, shape in enumerate(SHAPES)}
    grid, times = LocalGrid(echoing(), clients), []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        orders = (
            grid.create_message(RecordDict({"arrays": messages.pack(tensors, in_process=True)}), "train", node, "1")
            for node in grid.get_node_ids()
        )
        found = [messages.unpack(r.content.array_records["arrays"]) for r in grid.send_and_receive(orders)]
        times.append(time.perf_counter() - began)
        assert len(found) == clients
        assert found[0]["0.lora_A.weight"] is tensors["0.lora_A.weight"]
    return times[1:]


def ray_calls(clients: int, rounds: int) -> list[float]:
    """Return seconds to do the same in Flower's simulation, arrays in and arrays out."""
    times: list[float] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        while len(nodes := list(grid.get_node_ids())) < clients:
            time.sleep(0.1)
        arrays = [np.zeros(shape, np.float32) for shape in SHAPES]
        for _ in range(rounds + 1):
            began = time.perf_counter()
            content = RecordDict({"arrays": ArrayRecord(arrays)})
            orders = [Message(content, dst_node_id=node, message_type="train") for node in nodes]
            replies = list(grid.send_and_receive(orders))
            found = [r.content["arrays"].to_numpy_ndarrays() for r in replies]
            times.append(time.perf_counter() - began)
            assert [len(f) for f in found] == [len(SHAPES)] * clients
        times.pop(0)

    run_simulation(server, echoing(), clients, backend_config={"client_resources": {"num_cpus": 1}})
    return times


def ray(clients: int, rounds: int) -> list[float]:
    """Return seconds a round in Flower's simulation."""
    found: list[float] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = _strategy()
        _check(strategy.start(grid=grid, initial_arrays=start(), num_rounds=rounds + 2), rounds + 2)
        found.extend(strategy.seconds())

    run_simulation(server, client(), clients, backend_config={"client_resources": {"num_cpus": 1}})
    return found
