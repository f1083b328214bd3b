"""Stragglers, dropouts, clients that never come, empty shards; and that the loop runs on Flower's terms."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedtune import methods
from fedtune.config import Config, Settings
from fedtune.config.schema import FaultSettings
from fedtune.federation.faults import FaultyGrid, planned
from fedtune.federation.local import LocalGrid
from fedtune.federation.nodes import connect
from fedtune.federation.pool import LocalPool, Steps
from fedtune.federation.rounds import able, draw, run_rounds
from fedtune.methods import Algorithm
from fedtune.methods.state import ServerState
from fedtune.types import RunFailedError, derive_seed
from tests.faults.hostile import clients
from tests.faults.test_bad_updates import federation, start, toy_app


def _sample(config: Config, registered: Mapping[int, int], round_: int) -> list[int]:
    return draw(config, able(registered), round_)


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


def test_a_straggler_works_and_is_not_heard(settings: Callable[..., Settings], tmp_path: Path) -> None:
    """What it keeps to itself moves on, what it sends does not arrive: the case SCAFFOLD's way back was made for."""
    sgd = {"drift": {"scaffold": True}, "train": {"optimizer": "sgd"}}
    config = settings(federation={"clients": 4, "rounds": 6, "faults": {"straggler": 0.4}}, **sgd).config
    faults, algorithm = config.federation.faults, methods.create(config)
    late = {(r, c) for r in range(1, 7) for c in range(4) if planned(faults, config.seed, r, c) == "straggler"}
    worked: list[tuple[int, int]] = []
    believed: list[int] = []

    def app(algorithm: Algorithm) -> ClientApp:
        inner, made = clients(algorithm, start(), -1, lambda reply: reply), ClientApp()

        @made.train()
        def train(message: Message, context: Context) -> Message:
            order = message.content.config_records["order"]
            worked.append((int(str(order["round"])), int(str(order["client"]))))
            heard = message.content.array_records["adapter"]["scaffold/heard"]
            believed.append(int(heard.numpy()))
            return inner(message, context)

        return made

    grid = FaultyGrid(LocalGrid(app(algorithm), 4), faults, config.seed)
    done = run_rounds(federation(config, tmp_path, ClientApp(), grid=grid), algorithm.initial(start()))
    assert late
    assert worked == [(r, c) for r in range(1, 7) for c in range(4)]
    lost = {(r.round, x.client) for r in done.records for x in r.rejected if x.reason == "no_reply"}
    assert lost == late
    heard = [max((r for r in range(1, round_) if (r, client) not in late), default=0) for round_, client in worked]
    assert believed == heard, "the server says when it last heard a client, not when the client last worked"


def test_a_client_may_be_lost_between_the_exchanges_of_a_round(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    faults = {"dropout": 0.2, "straggler": 0.1, "error": 0.1}
    changes = {"clients": 4, "rounds": 12, "faults": faults, "max_skipped_rounds": 12}
    config = settings(federation=changes, method__name="fedask").config
    algorithm = methods.create(config)
    asked: list[tuple[int, int, int]] = []

    class Watching(LocalGrid):
        def exchange(self, orders: Any, take: Callable[[Message], None], timeout: float | None = None) -> Steps[None]:
            def noted(reply: Message) -> None:
                said = reply.content.config_records["identity"]
                asked.append(tuple(int(str(said[key])) for key in ("round", "phase", "client")))  # type: ignore[arg-type]
                take(reply)

            return super().exchange(orders, noted, timeout)

    inside = Watching(clients(algorithm, start(), -1, lambda reply: reply), 4)
    grid = FaultyGrid(inside, config.federation.faults, config.seed)
    done = run_rounds(federation(config, tmp_path, ClientApp(), grid=grid), algorithm.initial(start()))
    drawn = {
        (r, phase, c): planned(config.federation.faults, config.seed, r, c, phase)
        for r in range(1, 13)
        for phase in (1, 2)
        for c in range(4)
    }
    between = [key for key, fault in drawn.items() if key[1] == 2 and fault and not drawn[key[0], 1, key[2]]]
    assert len(between) >= 5
    for record in done.records:
        lost = {x.client for x in record.rejected}
        assert lost == {c for c in range(4) if drawn[record.round, 1, c] or drawn[record.round, 2, c]}
        assert {c.client for c in record.clients} == set(range(4)) - lost
    assert not [key for key in asked if drawn[key] in ("dropout", "error")]


class Watched:
    """A clock that clients turn on themselves, so that no test waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.mark.parametrize("together", [1, 2, 4])
def test_a_slow_client_misses_the_deadline_and_nobody_else_does(
    settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    watch, honest, app = Watched(monkeypatch), toy_app(), ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        watch.now += 1.3 if context.node_config["partition-id"] == 1 else 0.9
        return honest(message, context)

    config = settings(federation={"clients": 4, "rounds": 2, "deadline": 1.0}).config
    pool = LocalPool()
    pool.size = together
    grid = LocalGrid(app, 4, pool=pool)
    for record in run_rounds(federation(config, tmp_path, app, grid=grid), ServerState(start())).records:
        assert [c.client for c in record.clients] == [0, 2, 3]
        assert [(r.client, r.reason) for r in record.rejected] == [(1, "no_reply")]


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


class Nodes(LocalGrid):
    """A grid whose nodes say which partition they have, and may come and go."""

    partition_ids = None  # type: ignore[assignment]

    def __init__(self, said: dict[int, Any], there: Callable[[int], list[int]] | None = None) -> None:
        app = ClientApp()

        @app.query()
        def who(message: Message, context: Context) -> Message:
            record = said[message.metadata.dst_node_id]
            if isinstance(record, Exception):
                raise record
            return Message(RecordDict({} if record is None else {"identity": record}), reply_to=message)

        super().__init__(app, 4)
        self._said, self._there, self.polls = said, there, 0

    def get_node_ids(self) -> list[int]:
        self.polls += 1
        return self._there(self.polls) if self._there else list(self._said)


def _is(client: Any) -> ConfigRecord:
    return ConfigRecord({"client": client})


def test_partitions_are_counted_not_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.federation.nodes.POLL", 0.01)
    with pytest.raises(RunFailedError, match=r"2 of 3 clients connected.*more than one node says .* partition 0"):
        connect(Nodes({2: _is(0), 3: _is(0), 4: _is(2)}), 3, 0.1)
    assert connect(Nodes({2: _is(0), 3: _is(0), 4: _is(1)}), 2, 5.0) == {2: 0, 4: 1}
    odd = [None, _is(-1), _is(2), _is(True), _is("0"), _is(0.0), _is([0, 1]), ArrayRecord(), RuntimeError("[/x]")]
    nodes = {10 + i: record for i, record in enumerate(odd)}
    assert connect(Nodes({**nodes, 2: _is(1), 3: _is(0)}), 2, 5.0) == {2: 1, 3: 0}
    with pytest.raises(RunFailedError, match="0 of 2 clients"):
        connect(Nodes(nodes), 2, 0.05)


def test_a_node_that_comes_back_under_another_id_takes_its_place_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.federation.nodes.POLL", 0.01)
    said = {2: _is(0), 7: _is(0), 3: _is(1)}
    assert connect(Nodes(said, lambda poll: [2] if poll < 3 else [7, 3]), 2, 5.0) == {7: 0, 3: 1}
    assert connect(Nodes(said, lambda poll: [2, 7] if poll < 3 else [7, 3]), 2, 5.0) == {7: 0, 3: 1}


def test_what_a_draw_costs_depends_on_the_cohort_and_the_draws_stay_what_they_were(
    settings: Callable[..., Settings],
) -> None:
    config = settings(federation={"clients": 200, "fraction": 0.03}).config
    registered = {c: c % 3 for c in range(200)}
    whole = [c for c in sorted(registered) if registered[c]]
    for round_ in range(1, 30):
        generator = np.random.default_rng(derive_seed(config.seed, "sample", round_))
        plain = sorted(int(c) for c in generator.choice(whole, size=6, replace=False))
        assert _sample(config, registered, round_) == plain


def test_too_few_clients_with_data_are_refused_not_tolerated(settings: Callable[..., Settings], tmp_path: Path) -> None:
    config = settings(federation={"clients": 4, "rounds": 1, "min_clients": 3}).config
    with pytest.raises(RunFailedError, match="min_clients is 3, but only 2 of 4 clients have examples"):
        run_rounds(federation(config, tmp_path, toy_app(), registered={0: 5, 1: 0, 2: 0, 3: 5}), ServerState(start()))
    assert not (tmp_path / "rounds.jsonl").exists()
    enough = {0: 5, 1: 5, 2: 0, 3: 5}
    done = run_rounds(federation(config, tmp_path, toy_app(), registered=enough), ServerState(start()))
    assert [c.client for c in done.records[0].clients] == [0, 1, 3]


def test_a_client_alone_that_always_fails_is_an_error_of_its_own(
    settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """Idle rounds in between do not make a failure forgotten, and an untouched adapter is no result."""
    config = settings(federation={"clients": 10, "rounds": 40, "fraction": 0.1, "max_skipped_rounds": 3}).config
    app, calls = ClientApp(), []

    @app.train()
    def fails(message: Message, context: Context) -> Message:
        calls.append(1)
        raise RuntimeError("always")

    cohorts = [_sample(config, dict.fromkeys(range(10), 5), r) for r in range(1, 41)]
    counts = {c: sum(c in cohort for cohort in cohorts) for c in range(10)}
    often = max(counts, key=lambda c: counts[c])
    once = next(c for c, n in counts.items() if 0 < n < 3)
    with pytest.raises(RunFailedError, match=r"3 rounds in a row .*always"):
        run_rounds(federation(config, tmp_path / "a", app, only=frozenset({often})), ServerState(start()))
    assert len(calls) == 3
    with pytest.raises(RunFailedError, match=r"no round had enough good updates.*always"):
        run_rounds(federation(config, tmp_path / "b", app, only=frozenset({once})), ServerState(start()))
    short = settings(federation={"clients": 10, "rounds": 1, "fraction": 0.1}).config
    other = next(c for c in range(10) if c not in _sample(short, dict.fromkeys(range(10), 5), 1))
    with pytest.raises(RunFailedError, match="not asked in any of 1 rounds"):
        run_rounds(federation(short, tmp_path / "c", toy_app(), only=frozenset({other})), ServerState(start()))


def test_the_cohort_is_drawn_by_partition_and_round_and_never_from_empty_shards(
    settings: Callable[..., Settings],
) -> None:
    config = settings(federation={"clients": 50, "fraction": 0.1}).config
    full = dict.fromkeys(range(50), 3)
    drawn = [_sample(config, full, r) for r in range(1, 40)]
    assert drawn == [_sample(config, full, r) for r in range(1, 40)]
    assert all(len(set(c)) == 5 for c in drawn)
    assert len({i for c in drawn for i in c}) > 40
    holes = {**full, **dict.fromkeys(range(0, 50, 2), 0)}
    assert not {i for r in range(1, 40) for i in _sample(config, holes, r)} & set(range(0, 50, 2))
    few = {**dict.fromkeys(range(50), 0), 7: 1}
    assert _sample(config, few, 1) == [7]


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
