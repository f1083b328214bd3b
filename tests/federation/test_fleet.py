"""Several devices: the numbers of one, the costliest client first, and near-linear on paper."""

from __future__ import annotations

import importlib.util
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from fedtune.config import Config, Settings
from fedtune.experiment import devices
from fedtune.experiment.run import run
from fedtune.experiment.sweep import points, sweep
from fedtune.federation.fleet import Answering, Fleet, RayWorkers, Task
from fedtune.training import lpt
from fedtune.types import ConfigError


class FakeDevices:
    """Devices in this process with a clock of their own: a task takes as long as it costs."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.hands = [Answering(f"cpu#{i}", devices.resident_clients) for i in range(count)]
        self.clock = [0.0] * count
        self.doing: deque[tuple[float, int, Task]] = deque()
        self.log: list[tuple[int, str, float]] = []

    def prepare(self, run: str, recipe: Any) -> None:
        for hand in self.hands:
            hand.prepare(run, recipe)

    def start(self, worker: int, task: Task) -> None:
        self.clock[worker] += task.cost
        self.doing.append((self.clock[worker], worker, task))
        self.log.append((worker, task.run, task.cost))

    def finished(self) -> tuple[int, Message]:
        first = min(self.doing, key=lambda d: d[:2])
        self.doing.remove(first)
        _, worker, task = first
        return worker, self.hands[worker].answer(task.run, task.message)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeDevices]:
    made: list[FakeDevices] = []

    def fleet(names: Any) -> Any:
        made.append(FakeDevices(len(names)))
        return Fleet(made[-1]), lambda: None

    monkeypatch.setattr(devices, "fleet", fleet)
    return made


def adapter(folder: Path) -> dict[str, Tensor]:
    import safetensors.torch

    return safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "flora"])
def test_a_fleet_gives_what_one_device_gives(
    settings: Callable[..., Settings], tmp_path: Path, fakes: list[FakeDevices], name: str
) -> None:
    changes: dict[str, Any] = {"federation": {"clients": 5, "rounds": 2}, "method": {"name": name}}
    one, _ = run(settings(**changes), tmp_path / "one")
    two, _ = run(settings(**changes, engine={"devices": ["cpu", "cpu", "cpu"]}), tmp_path / "two")
    assert {worker for worker, _, _ in fakes[0].log} == {0, 1, 2}
    mine, theirs = adapter(two), adapter(one)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in theirs)


def test_a_sweep_puts_the_clients_of_all_its_runs_on_one_fleet(
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

    def broken(told: Any, device: str) -> Any:
        if device.endswith("#1"):
            raise RuntimeError("out of memory")
        return plain(told, device)

    monkeypatch.setattr(devices, "resident_clients", broken)
    config = settings(federation={"clients": 4, "rounds": 1}, engine={"devices": ["cpu", "cpu"]})
    folder, result = run(config, tmp_path / "run")
    assert result.lost_clients == sum(worker == 1 for worker, _, _ in fakes[0].log) > 0
    assert "out of memory" in (folder / "rounds.jsonl").read_text()


def test_longest_first_is_near_linear_and_never_worse_than_four_thirds() -> None:
    drawn = random.Random(1)
    # the clients a round of four domains, three seeds each: 11 x 3 tasks of very different length
    costs = [drawn.choice([80, 130, 130, 230]) * drawn.uniform(0.5, 2) for _ in range(33)]
    for workers in (1, 2, 4, 8):
        best = max(sum(costs) / workers, max(costs))
        assert lpt.makespan(costs, workers) <= 4 / 3 * best
        assert sum(costs) / lpt.makespan(costs, workers) >= 0.85 * workers
    assert lpt.assign([3, 1, 2], 2) == [[0], [2, 1]]
    assert lpt.makespan([], 3) == 0.0


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="fedtune\\[simulation\\]"):
        RayWorkers(["cuda:0"], devices.resident_clients)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_actors_give_what_one_device_gives(
    tiny_config: Config, settings: Callable[..., Settings], tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"federation": {"clients": 4, "rounds": 2}, "model__dtype": "float32"}
    one, _ = run(settings(**changes), tmp_path / "one")
    two, _ = run(settings(**changes, engine={"devices": ["cpu", "cpu"]}), tmp_path / "two")
    assert all(torch.allclose(t, adapter(two)[n], atol=1e-6) for n, t in adapter(one).items())
