"""What a device of a fleet does: it loads the model once and trains the clients it is sent, for any run of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import Message

from fedtune import methods
from fedtune.config import Config
from fedtune.experiment.report import Reporter
from fedtune.federation.app import Runtime, client_app
from fedtune.federation.fleet import Fleet, RayWorkers
from fedtune.federation.local import LocalGrid
from fedtune.federation.messages import IDENTITY, METRICS
from fedtune.federation.private import PrivateStore
from fedtune.io import digest
from fedtune.lora.state import AdapterState
from fedtune.models import adapter, load
from fedtune.training import workload
from fedtune.training.plan import executor, plan

# the models of this process, by settings and device; a fleet's runs share them
_attached: dict[str, adapter.AdaptedModel] = {}


@dataclass(frozen=True)
class Told:
    """What a device has to know of a run's arm: settings, the folder of what clients keep, and the start."""

    config: Config
    folder: Path
    start: AdapterState


def _model(config: Config, device: str) -> adapter.AdaptedModel:
    """Return the model of some settings with an adapter; made once a process and device."""
    plain = config.plain()
    key = digest([plain["model"], plain["lora"], device])
    if key not in _attached:
        # every use loads its own numbers, so any seed will do; a second device of a kind is told by its number
        _attached[key] = adapter.attach(load.load(config.model, device.partition("#")[0]), config.lora, 0)
    return _attached[key]


def resident_clients(told: Told, device: str) -> LocalGrid:
    """Return a run's clients on a device, with the model resident there."""
    config = told.config
    adapted = _model(config, device)
    shards = workload.encode_shards(workload.load(config), adapted.base.tokenizer, config)
    train = config.train
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps
    how = replace(plan(config, adapted, shards.longest, shards.mean * batch), cohort=1)
    runtime = Runtime(
        config,
        adapted,
        methods.create(config),
        told.start,
        workload.poisoned(shards, config),
        PrivateStore(told.folder / "clients", config.federation.keep_checkpoints),
        executor=executor(how, adapted),
    )
    return LocalGrid(client_app(lambda context: runtime), config.federation.clients)


def fleet(devices: Sequence[str]) -> tuple[Fleet, Callable[[], None]]:
    """Return a fleet of Ray actors on some devices, and what ends it."""
    workers = RayWorkers(devices, resident_clients)
    return Fleet(workers), workers.close


def reported(reporter: Reporter) -> Callable[[Message], None]:
    """Return what tells a reporter of the clients' replies."""

    def tell(reply: Message) -> None:
        metrics = reply.content.metric_records[METRICS]
        client = int(str(reply.content.config_records[IDENTITY]["client"]))
        reporter.step(client, int(float(str(metrics["tokens"]))), float(str(metrics["loss"])))

    return tell
