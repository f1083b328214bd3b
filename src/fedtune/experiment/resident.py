"""A base model in memory, with an adapter and the executor that trains it, for one run or for several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from fedtune import spaces
from fedtune.config import Config
from fedtune.experiment import devices
from fedtune.federation.pool import LocalPool
from fedtune.federation.workers import WorkerPool
from fedtune.lora.state import AdapterState
from fedtune.models import load
from fedtune.models.adapted import AdaptedModel
from fedtune.training.executor import Sequential
from fedtune.training.plan import Plan, executor, plan
from fedtune.training.workload import EncodedShards
from fedtune.types import derive_seed


@dataclass
class Resident:
    """A model that runs share, with an adapter of their settings, and the adapter that each seed's run starts from.

    The first run's plan holds for all. The pool answers the clients of all runs, in this process or on the devices that
    the settings name; `end` ends it.
    """

    base: load.LoadedModel
    adapted: AdaptedModel
    starts: Mapping[int, AdapterState]
    how: Plan | None = None
    end: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.pool: LocalPool | WorkerPool = LocalPool(Sequential(self.adapted))

    @staticmethod
    def of(config: Config, seeds: Iterable[int]) -> Resident:
        """Load the model of some settings, with the start of each of some seeds."""
        base, space = load.load(config.model), spaces.of(config)
        starts = {}
        for seed in dict.fromkeys(seeds):
            adapted = space.attach(base, config, derive_seed(seed, "adapter"))
            starts[seed] = adapted.state()
            adapted.detach()
        # any seed will do: every use of the model loads its own numbers
        return Resident(base, space.attach(base, config, 0), starts)

    def planned(self, config: Config, shards: EncodedShards, before: Plan | None = None) -> Plan:
        """Return the plan by which all runs train: the first one's, or that with which it began."""
        if self.how is None:
            self.how = before or plan(config, self.adapted, shards.longest, shards.mean * config.train.batch)
            self.pool = LocalPool(executor(self.how, self.adapted))
            if config.engine.side_by_side:
                names = devices.named(config)
                self.pool, self.end = devices.worker_pool(names, self.how, threads=config.engine.threads)
        return self.how
