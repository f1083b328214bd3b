"""Stragglers, dropouts, clients that never come, empty shards; and that the loop runs on Flower's terms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedtune.config import Config, Settings
from fedtune.config.schema import FaultSettings
from fedtune.federation.faults import FaultyGrid, planned
from fedtune.federation.local import LocalGrid
from fedtune.federation.rounds import connect, run_rounds, sample
from fedtune.methods.base import ServerState
from fedtune.types import RunFailedError
from tests.faults.test_bad_updates import federation, start, toy_app


def test_planned_faults_are_seeded_and_recorded(settings: Callable[..., Settings], tmp_path: Path) -> None:
    faults = {"dropout": 0.3, "straggler": 0.2, "error": 0.2}
    config = settings(federation={"clients": 4, "rounds": 6, "faults": faults, "max_skipped_rounds": 9}).config

    def once(name: str) -> Any:
        app = toy_app()
        grid = FaultyGrid(LocalGrid(app, 4), config.federation.faults, config.seed)
        return run_rounds(federation(config, tmp_path / name, app, grid=grid), ServerState(start()))

    first, second = once("a"), once("b")
    assert first.records == second.records
    reasons = [r.reason for record in first.records for r in record.rejected]
    assert {"no_reply", "error"} <= set(reasons)
    for record in first.records:
        lost = {r.client for r in record.rejected}
        assert lost == {c for c in range(4) if planned(config.federation.faults, config.seed, record.round, c)}
        assert lost | {c.client for c in record.clients} == set(record.cohort)


def test_shares_of_planned_faults_are_those_asked_for() -> None:
    faults = FaultSettings(dropout=0.2, straggler=0.3, error=0.1)
    drawn = [planned(faults, 1, r, c) for r in range(100) for c in range(50)]
    shares = {name: drawn.count(name) / len(drawn) for name in ("dropout", "straggler", "error", "")}  # type: ignore[arg-type]
    assert shares == pytest.approx({"dropout": 0.2, "straggler": 0.3, "error": 0.1, "": 0.4}, abs=0.03)


def test_replies_after_the_deadline_are_not_waited_for(settings: Callable[..., Settings], tmp_path: Path) -> None:
    import time

    config = settings(federation={"clients": 4, "rounds": 1, "deadline": 0.15}).config
    app = ClientApp()
    honest = toy_app()

    @app.train()
    def slow(message: Message, context: Context) -> Message:
        time.sleep(0.1)
        return honest(message, context)

    done = run_rounds(federation(config, tmp_path, app), ServerState(start()))
    assert done.records[0].status == "ok"
    late = [r.client for r in done.records[0].rejected if r.reason == "no_reply"]
    assert late
    assert len(late) + len(done.records[0].clients) == 4


class Lonely(LocalGrid):
    """A grid on which only some of the nodes ever appear, and which must be asked for partitions."""

    partition_ids = None  # type: ignore[assignment]

    def get_node_ids(self) -> list[int]:
        return [2, 3]


def _query_app() -> ClientApp:
    from flwr.app import ConfigRecord

    app = ClientApp()

    @app.query()
    def who(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        return Message(RecordDict({"identity": ConfigRecord({"client": client, "examples": 5})}), reply_to=message)

    return app


def test_clients_that_never_connect_end_the_wait_with_the_count_and_the_address() -> None:
    grid = Lonely(_query_app(), 4)
    with pytest.raises(RunFailedError, match=r"2 of 4 clients connected to 127\.0\.0\.1:9092 within 0\.3 s"):
        connect(grid, 4, 0.3, "127.0.0.1:9092")
    assert connect(grid, 2, 5.0) == {2: 0, 3: 1}


def test_the_cohort_is_drawn_by_partition_and_round_and_never_from_empty_shards(
    settings: Callable[..., Settings],
) -> None:
    config = settings(federation={"clients": 50, "fraction": 0.1}).config
    full = dict.fromkeys(range(50), 3)
    drawn = [sample(config, full, r) for r in range(1, 40)]
    assert drawn == [sample(config, full, r) for r in range(1, 40)]
    assert all(len(set(c)) == 5 for c in drawn)
    assert len({i for c in drawn for i in c}) > 40
    holes = {**full, **dict.fromkeys(range(0, 50, 2), 0)}
    assert not {i for r in range(1, 40) for i in sample(config, holes, r)} & set(range(0, 50, 2))
    few = {**dict.fromkeys(range(50), 0), 7: 1}
    assert sample(config, few, 1) == [7]


def test_nobody_with_data_is_an_error(settings: Callable[..., Settings], tmp_path: Path) -> None:
    config = settings().config
    with pytest.raises(RunFailedError, match="no client has an example"):
        run_rounds(federation(config, tmp_path, toy_app(), registered=dict.fromkeys(range(4), 0)), ServerState(start()))


def test_bytes_are_counted_as_sent(tiny_config: Config, tmp_path: Path) -> None:
    done = run_rounds(federation(tiny_config, tmp_path, toy_app()), ServerState(start()))
    message = (6 + 8) * 4 + 2 * 128
    assert [(r.bytes_down, r.bytes_up) for r in done.records] == [(4 * message, 4 * message)] * 3


def test_flowers_own_strategy_and_apps_run_on_the_local_grid() -> None:
    """An unmodified FedAvg of Flower's, with an ordinary ClientApp, for two rounds."""
    from flwr.serverapp.strategy import FedAvg

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = message.content.array_records["arrays"].to_torch_state_dict()
        client = int(context.node_config["partition-id"])
        arrays = ArrayRecord({n: t + client for n, t in state.items()})
        metrics = MetricRecord({"num-examples": client + 1, "loss": 1.0})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=3, min_train_nodes=3)
    start = ArrayRecord({"w": torch.zeros(2)})
    result = strategy.start(grid=LocalGrid(app, 3), initial_arrays=start, num_rounds=2)
    mean = (0 * 1 + 1 * 2 + 2 * 3) / 6
    assert torch.allclose(result.arrays.to_torch_state_dict()["w"], torch.full((2,), 2 * mean))


def test_a_tensor_array_serialises_to_flowers_own_bytes() -> None:
    from flwr.app import Array

    from fedtune.federation.messages import TensorArray

    tensor = torch.randn(3, 4)
    assert TensorArray(tensor).data == Array(tensor.numpy()).data
    assert torch.equal(torch.from_numpy(TensorArray(tensor).numpy()), tensor)


def test_push_and_pull_hand_each_reply_out_once() -> None:
    grid = LocalGrid(_query_app(), 2)
    ids = list(grid.push_messages([grid.create_message(RecordDict(), "query", n, "") for n in grid.get_node_ids()]))
    assert len(list(grid.pull_messages(ids))) == 2
    assert list(grid.pull_messages(ids)) == []
