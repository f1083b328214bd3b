"""What a worker does: it loads the model once and trains the clients it is sent, for any run of a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from flwr.app import Message
from flwr.clientapp import ClientApp

from fedtune import methods, spaces
from fedtune.config import Config
from fedtune.experiment.reporter import Reporter
from fedtune.federation.app import Runtime, client_app
from fedtune.federation.messages import read_reply
from fedtune.federation.private import PrivateStore
from fedtune.federation.screening import LARGEST_COUNT
from fedtune.federation.simulation import FlowerWorkers
from fedtune.federation.workers import WorkerPool
from fedtune.io import digest
from fedtune.lora.state import AdapterState
from fedtune.machine import cores
from fedtune.models import load
from fedtune.models.adapted import AdaptedModel
from fedtune.training.plan import Plan, executor
from fedtune.training.workload import EncodedShards
from fedtune.types import ConfigError, Problem

# steps of one reply that progress counts: a client may claim any number
MOST_SHOWN = 10_000
# the models of this process, by settings and device; the runs of a worker pool share them
_attached: dict[str, AdaptedModel] = {}


@dataclass(frozen=True)
class RunSpec:
    """What a device has to know of a run's arm: the start is as the run's seed made it, the shards as trained on."""

    config: Config
    folder: Path
    start: AdapterState
    shards: EncodedShards


def _model(config: Config, device: str) -> AdaptedModel:
    """Return the model of some settings with an adapter; made once a process and device."""
    plain = config.plain()
    key = digest([plain["model"], plain["peft"], plain["lora"], device])
    if key not in _attached:
        # every use loads its own numbers, so any seed will do; a second device of a kind is known by its number
        base = load.load(config.model, device.partition("#")[0])
        _attached[key] = spaces.of(config).attach(base, config, 0)
    return _attached[key]


def resident_clients(spec: RunSpec, device: str, how: Plan) -> ClientApp:
    """Return a run's clients on a device, with the model resident there."""
    config = spec.config
    adapted, algorithm = _model(config, device), methods.create(config)
    private = PrivateStore(spec.folder / "clients", config.federation.keep_checkpoints)
    runtime = Runtime(config, adapted, algorithm, spec.start, spec.shards, executor(how, adapted), private)
    return client_app(lambda context: runtime)


def named(config: Config) -> Sequence[str]:
    """Return the devices that train clients side by side: those of the settings, or all GPUs, or all cores.

    Raises:
        ConfigError: a GPU is named that is not there.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    missing = [d for d in config.engine.devices if d != "cpu" and d not in gpus]
    if missing:
        there = ", ".join(gpus) or "no GPU"
        raise ConfigError("settings", [Problem("engine.devices", f"no {', '.join(missing)} here", f"there is {there}")])
    if config.engine.devices or gpus:
        return config.engine.devices or gpus
    return ["cpu"] * min(cores(), config.federation.cohort_size)


def worker_pool(devices: Sequence[str], how: Plan, *, threads: int = 0) -> tuple[WorkerPool, Callable[[], None]]:
    """Return a pool of workers, Flower's Ray actors, and what ends it.

    Processors share the threads of the run's plan, or have `threads` each if asked for.
    """
    split = 1 if devices[0] != "cpu" else len(devices)
    own = replace(how, cohort=1, threads=threads or max(1, how.threads // split))
    workers = FlowerWorkers(devices, partial(resident_clients, how=own))
    return WorkerPool(workers), workers.close


def reported(reporter: Reporter) -> Callable[[Message], None]:
    """Return what tells a reporter of the clients' replies."""

    def tell(reply: Message) -> None:
        said = read_reply(reply, {})
        tokens, steps = said.metrics.get("tokens", 0.0), said.metrics.get("steps", 0.0)
        if said.claims is None or not (0 <= tokens <= LARGEST_COUNT and 0 <= steps <= LARGEST_COUNT):
            return
        whole, count = int(tokens), min(int(steps), MOST_SHOWN)
        for step in range(count):  # all at once, when the client is done
            part = whole * (step + 1) // count - whole * step // count
            reporter.step(said.claims[2], part, said.metrics.get("loss", math.nan))

    return tell
