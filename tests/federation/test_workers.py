"""Several devices: the numbers of one, the costliest client first, and near-linear on paper."""

from __future__ import annotations

import importlib.util
import os
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedtune.config import Config, Settings
from fedtune.experiment import devices
from fedtune.experiment.reporter import Reporter
from fedtune.experiment.run import run
from fedtune.experiment.sweep import points, sweep
from fedtune.federation import simulation
from fedtune.federation.messages import METRICS
from fedtune.federation.simulation import FlowerWorkers
from fedtune.federation.workers import WorkerCall, WorkerGrid, WorkerPool
from fedtune.training.plan import Plan
from fedtune.types import ConfigError


class FakeDevices:
    """Devices in this process with a clock of their own: a task takes as long as it costs."""

    def __init__(self, count: int, how: Plan | None) -> None:
        self.count, self.how = count, how
        self.specs: dict[str, Any] = {}
        self.over: list[str] = []
        self.clients: dict[tuple[int, str], ClientApp] = {}
        self.clock = [0.0] * count
        self.doing: deque[tuple[float, int, WorkerCall]] = deque()
        self.log: list[tuple[int, str, float]] = []

    def prepare(self, run: str, spec: Any) -> None:
        self.specs[run] = spec

    def release(self, run: str) -> None:
        self.over.append(run)

    def abandon(self, worker: int) -> None:
        raise AssertionError("nobody is late")

    def start(self, worker: int, task: WorkerCall) -> None:
        self.clock[worker] += task.cost
        self.doing.append((self.clock[worker], worker, task))
        self.log.append((worker, task.run, task.cost))

    def finished(self, timeout: float | None = None) -> tuple[int, Message | Exception]:
        first = min(self.doing, key=lambda d: d[:2])
        self.doing.remove(first)
        _, worker, task = first
        try:
            key = worker, task.run
            if key not in self.clients:
                self.clients[key] = devices.resident_clients(self.specs[task.run], f"cpu#{worker}", self.how)
            return worker, self.clients[key](task.message, task.context)
        except Exception as err:
            return worker, err


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeDevices]:
    made: list[FakeDevices] = []

    def worker_pool(names: Any, how: Plan, *, threads: int) -> Any:
        made.append(FakeDevices(len(names), how))
        return WorkerPool(made[-1]), lambda: None

    monkeypatch.setattr(devices, "worker_pool", worker_pool)
    return made


def adapter(folder: Path) -> dict[str, Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "flora"])
def test_a_worker_pool_gives_what_one_device_gives(
    settings: Callable[..., Settings], tmp_path: Path, fakes: list[FakeDevices], name: str
) -> None:
    changes: dict[str, Any] = {"federation": {"clients": 5, "rounds": 2}, "method": {"name": name}}
    one, _ = run(settings(**changes), tmp_path / "one")
    two, _ = run(settings(**changes, engine={"devices": ["cpu", "cpu", "cpu"]}), tmp_path / "two")
    assert {worker for worker, _, _ in fakes[0].log} == {0, 1, 2}
    mine, theirs = adapter(two), adapter(one)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in theirs)


def test_clients_alone_in_workers_get_their_own_examples_and_no_others(
    settings: Callable[..., Settings], tmp_path: Path, fakes: list[FakeDevices]
) -> None:
    changes: dict[str, Any] = {"federation": {"clients": 3, "rounds": 1}, "arm": "local-only"}
    _, one = run(settings(**changes), tmp_path / "one")
    _, two = run(settings(**changes, engine={"devices": ["cpu", "cpu"]}), tmp_path / "two")
    assert [(a.name, a.scores) for a in one.arms] == [(a.name, a.scores) for a in two.arms]
    held = [[c for c, own in enumerate(spec.shards.shards) if own] for spec in fakes[0].specs.values()]
    assert held == [[0], [1], [2]]


def test_who_watches_a_worker_pool_hears_of_every_step(
    settings: Callable[..., Settings], tmp_path: Path, fakes: list[FakeDevices]
) -> None:
    class Counting(Reporter):
        def __init__(self) -> None:
            self.steps: Counter[int] = Counter()
            self.tokens: Counter[int] = Counter()

        def step(self, client: int, tokens: int, loss: float) -> None:
            self.steps[client] += 1
            self.tokens[client] += tokens

    one, two = Counting(), Counting()
    changes: dict[str, Any] = {"federation": {"clients": 3, "rounds": 1}, "train": {"max_steps": 3}}
    run(settings(**changes), tmp_path / "one", reporter=one)
    run(settings(**changes, engine={"devices": ["cpu", "cpu"]}), tmp_path / "two", reporter=two)
    assert (two.steps, two.tokens) == (one.steps, one.tokens)


def test_a_sweep_puts_the_clients_of_all_its_runs_in_one_worker_pool(
    settings: Callable[..., Settings], tmp_path: Path, fakes: list[FakeDevices]
) -> None:
    def build(where: Any) -> Settings:
        return settings(seed=where["seed"], federation={"clients": 3, "rounds": 1}, engine={"devices": ["cpu", "cpu"]})

    sweep(points({"seed": [1, 2, 3]}, build, tmp_path / "sweep"), tmp_path / "sweep")
    (fake,) = fakes
    assert len(fake.log) == 9
    assert len({run for _, run, _ in fake.log}) == 3
    assert max(fake.clock) <= 4 / 3 * sum(cost for *_, cost in fake.log) / 2
    costs = [cost for *_, cost in fake.log]
    assert costs == sorted(costs, reverse=True), "the costliest of all runs come first"


def test_a_device_that_fails_costs_its_clients_and_no_more(
    settings: Callable[..., Settings], tmp_path: Path, fakes: list[FakeDevices], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = devices.resident_clients

    def broken(spec: Any, device: str, how: Plan) -> Any:
        if device.endswith("#1"):
            raise RuntimeError("out of memory")
        return plain(spec, device, how)

    monkeypatch.setattr(devices, "resident_clients", broken)
    config = settings(federation={"clients": 4, "rounds": 1}, engine={"devices": ["cpu", "cpu"]})
    folder, result = run(config, tmp_path / "run")
    assert result.lost_clients == sum(worker == 1 for worker, _, _ in fakes[0].log) > 0
    assert "out of memory" in (folder / "rounds.jsonl").read_text()


class Hanging(FakeDevices):
    """Devices on which one client never comes to an end."""

    def __init__(self, count: int) -> None:
        self.count, self.abandoned = count, list[int]()
        self.doing = deque[tuple[float, int, WorkerCall]]()
        self.most = 0

    def start(self, worker: int, task: WorkerCall) -> None:
        assert worker not in {w for _, w, _ in self.doing}
        self.doing.append((task.cost, worker, task))
        self.most = max(self.most, len(self.doing))

    def finished(self, timeout: float | None = None) -> Any:
        well = [d for d in self.doing if d[2].cost < 100]
        if not well:
            time.sleep(timeout or 0)
            return None
        self.doing.remove(well[0])
        return well[0][1], Message(RecordDict({METRICS: MetricRecord({"steps": 1})}), reply_to=well[0][2].message)

    def abandon(self, worker: int) -> None:
        self.abandoned.append(worker)
        self.doing = deque(d for d in self.doing if d[1] != worker)


def test_a_client_that_hangs_misses_the_deadline_and_frees_its_device() -> None:
    devices_ = Hanging(2)
    grid = WorkerGrid(WorkerPool(devices_), "run", 40, lambda m: 1000.0 if m.metadata.dst_node_id == 5 else 1.0)
    made: list[int] = []

    def orders() -> Any:
        for node in grid.get_node_ids():
            made.append(node)
            yield grid.create_message(RecordDict(), "train", node, "1")

    heard = [(reply.metadata.src_node_id, len(made)) for reply in grid.send_and_receive(orders(), timeout=0.2)]
    assert [node for node, _ in heard] == [n for n in range(2, 42) if n != 5], "to wait for a device is no delay"
    assert [count for _, count in heard] == [16] * 15 + [32] * 16 + [40] * 8, "orders are made as they are sent"
    assert len(devices_.abandoned) == 1
    assert not devices_.doing


def test_a_large_cohort_is_ordered_and_heard_piece_by_piece() -> None:
    grid = WorkerGrid(WorkerPool(Hanging(2)), "run", 100, lambda m: 1.0)
    made: list[int] = []

    def orders() -> Any:
        for node in grid.get_node_ids():
            made.append(node)
            yield grid.create_message(RecordDict(), "train", node, "1")

    ahead = [len(made) - i for i, _ in enumerate(grid.send_and_receive(orders()))]
    assert len(ahead) == 100
    assert max(ahead) <= 16


def test_the_spec_of_a_run_is_forgotten_when_it_is_over(
    settings: Callable[..., Settings], tmp_path: Path, fakes: list[FakeDevices], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(federation={"clients": 2, "rounds": 1}, arm="local-only", engine={"devices": ["cpu", "cpu"]})
    run(config, tmp_path / "run")
    assert sorted(fakes[0].over) == sorted(fakes[0].specs)
    assert len(fakes[0].over) == 2

    made = simulation.Clients(lambda spec, device: f"clients of {spec}", "cpu", {"b": 1})  # type: ignore[arg-type,return-value]
    monkeypatch.setattr(simulation, "_met", {"a": "clients of a", "b": lambda message, context: "answered"})
    context = SimpleNamespace(run_config={"run": "b"})
    assert made._answer(None, context) == "answered"  # type: ignore[arg-type,comparison-overlap]
    assert list(simulation._met) == ["b"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 1e308, 5])
def test_progress_survives_whatever_a_reply_claims(value: float) -> None:
    steps: list[int] = []

    class Counting(Reporter):
        def step(self, client: int, tokens: int, loss: float) -> None:
            steps.append(client)

    grid = WorkerGrid(WorkerPool(Hanging(1)), "run", 1, lambda m: 1.0)
    order = grid.create_message(RecordDict(), "train", 2, "1")
    tell = devices.reported(Counting())
    identity = ConfigRecord({"run": "run", "round": 1, "client": 0, "phase": 1})
    for metrics in ({"tokens": value, "steps": value, "loss": value}, {"steps": value}, {}):
        content = RecordDict({METRICS: MetricRecord(metrics), "identity": identity})
        tell(Message(content, reply_to=order))
    tell(Message(RecordDict(), reply_to=order))
    tell(Message(RecordDict({METRICS: MetricRecord({"steps": 2})}), reply_to=order))
    assert len(steps) == (10 if value == 5 else 0)


def test_longest_first_is_near_linear_and_never_worse_than_four_thirds() -> None:
    drawn = random.Random(1)
    # the clients a round of four domains, three seeds each: 11 x 3 tasks of very different length
    costs = [drawn.choice([80, 130, 130, 230]) * drawn.uniform(0.5, 2) for _ in range(33)]
    for workers in (1, 2, 4, 8):
        longest = max(clocks_of(costs, workers))
        best = max(sum(costs) / workers, max(costs))
        assert longest <= 4 / 3 * best
        assert sum(costs) / longest >= 0.85 * workers
    assert clocks_of([3, 1, 2], 2) == [3, 3]
    assert clocks_of([], 3) == [0, 0, 0]


def clocks_of(costs: Sequence[float], workers: int) -> list[float]:
    """Give tasks of these costs to a pool, and return how long each of its devices worked."""
    devices_ = FakeDevices(workers, None)
    grid = WorkerGrid(WorkerPool(devices_), "run", len(costs), lambda m: costs[m.metadata.dst_node_id - 2])
    messages = [grid.create_message(RecordDict(), "train", node, "1") for node in grid.get_node_ids()]
    grid.pool.answer([grid._calls(messages, None)])
    assert [cost for _, _, cost in devices_.log] == sorted(costs, reverse=True)
    return devices_.clock


def test_a_gpu_that_is_not_there_is_told_before_anything_starts(settings: Callable[..., Settings]) -> None:
    config = settings(engine={"devices": ["cuda:0", "cuda:97"]}).config
    with pytest.raises(ConfigError, match="cuda:97 here"):
        devices.named(config)
    assert devices.named(settings(engine={"devices": ["cpu"]}).config) == ("cpu",)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"devices": ["cpu"], "executor": "cohort"}, "say ray"),
        ({"devices": ["cpu", "cuda:0"]}, "all cpu, or all GPUs"),
        ({"devices": ["gpu0"]}, "cpu|cuda:"),
        ({"devices": ["cuda:0", "cuda:0"]}, "each once"),
        ({"executor": "ray", "cohort": 4}, "no effect"),
    ],
)
def test_devices_that_cannot_be_meant_are_refused(
    settings: Callable[..., Settings], engine: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(engine=engine)


def test_ray_is_shown_the_named_gpus_while_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for shown, names, seen in (
        ("4,5,6", ["cuda:0", "cuda:2"], "4,6"),
        ("", ["cuda:1"], "1"),
        ("7", ["cpu"], "7"),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        with simulation._environment(names):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
            os.environ["PYTHONPATH"] = "changed"
        assert os.environ["CUDA_VISIBLE_DEVICES"] == shown
        assert "PYTHONPATH" not in os.environ


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="fedtune\\[simulation\\]"):
        FlowerWorkers(["cuda:0"], devices.resident_clients)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_actors_give_what_one_device_gives(
    tiny_config: Config, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"federation": {"clients": 4, "rounds": 2}, "model__dtype": "float32"}
    one, _ = run(settings(**changes), tmp_path / "one")
    two, result = run(settings(**changes, engine={"executor": "ray"}), tmp_path / "two")
    assert result.lost_clients == 0
    assert all(torch.allclose(t, adapter(two)[n], atol=1e-6) for n, t in adapter(one).items())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_what_fails_in_an_actor_comes_back_as_an_error_and_a_dead_actor_is_replaced() -> None:
    def sometimes(spec: Any, device: str) -> Any:
        def answer(message: Message, context: Any) -> Message:
            if context.node_config["partition-id"] == 1:
                raise RuntimeError(f"{spec}: out of memory on {device}")
            if context.node_config["partition-id"] == 2:
                os._exit(1)
            return Message(RecordDict({METRICS: MetricRecord({"examples": 1})}), reply_to=message)

        return answer

    workers = FlowerWorkers(["cpu"], sometimes)
    try:
        workers.prepare("run", "a run")
        grid = WorkerGrid(WorkerPool(workers), "run", 4, lambda message: 1.0)
        orders = [grid.create_message(RecordDict(), "train", node, "1") for node in grid.get_node_ids()]
        replies = list(grid.send_and_receive(orders))
    finally:
        workers.close()
    assert [reply.has_error() for reply in replies] == [False, True, True, False]
    assert "a run: out of memory on cpu" in replies[1].error.reason
    assert "Actor" in replies[2].error.reason


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_an_actor_that_hangs_is_replaced_and_one_that_is_told_of_a_run_forgets_it() -> None:
    def sometimes(spec: Any, device: str) -> Any:
        def answer(message: Message, context: Any) -> Message:
            if context.node_config["partition-id"] == 0:
                time.sleep(600)
            return Message(RecordDict({METRICS: MetricRecord({"examples": 1})}), reply_to=message)

        return answer

    workers = FlowerWorkers(["cpu"], sometimes)
    try:
        workers.prepare("run", "a run")
        grid = WorkerGrid(WorkerPool(workers), "run", 2, lambda message: 1.0)

        def asked(nodes: list[int], timeout: float) -> list[int]:
            orders = [grid.create_message(RecordDict(), "train", node, "1") for node in nodes]
            return [r.metadata.src_node_id for r in grid.send_and_receive(orders, timeout=timeout)]

        assert asked([3], 300.0) == [3]
        assert asked([2], 2.0) == []
        assert asked([3], 300.0) == [3], "the device works again"
        workers.release("run")
        assert workers._clients.specs == {}
    finally:
        workers.close()
