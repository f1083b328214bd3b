"""The arms of an experiment: federated, each client on its own, and all data in one place, matched by steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flwr.app import Context

from fedtune import methods
from fedtune.config import Config
from fedtune.experiment.report import Reporter
from fedtune.federation.app import Runtime, client_app
from fedtune.federation.checkpoint import Progress
from fedtune.federation.faults import FaultyGrid
from fedtune.federation.local import LocalGrid
from fedtune.federation.rounds import Federation, run_rounds
from fedtune.lora.state import AdapterState
from fedtune.methods.base import ServerState
from fedtune.models.adapter import AdaptedModel
from fedtune.models.budget import message_bytes
from fedtune.training.workload import EncodedShards
from fedtune.types import RoundRecord


def derive(config: Config, arm: str) -> Config:
    """Return the settings of an arm.

    Centralised training is one client with all rows that makes, each round, as many steps as a whole cohort
    does; local-only keeps the federation's settings and lets each client take part alone.
    """
    if arm != "centralised":
        return config.model_copy(update={"arm": arm})
    steps = config.train.max_steps * config.federation.cohort_size
    federation = config.federation.model_copy(update={"clients": 1, "fraction": 1.0, "min_clients": 1})
    return config.model_copy(
        update={
            "arm": arm,
            "federation": federation,
            "train": config.train.model_copy(update={"max_steps": steps}),
            "data": config.data.model_copy(update={"partition": "iid"}),
        }
    )


def wire(config: Config, start: AdapterState) -> Callable[[int], int]:
    """Return what tells, for a round, how many bytes one client exchanges under the run's method."""
    method, state = methods.create(config), ServerState(start)

    def exchanged(round_: int) -> int:
        return message_bytes(method.view(state, 0)) + message_bytes(method.expected(state, 0, round_))

    return exchanged


@dataclass(frozen=True)
class Arm:
    """One training of an experiment, ready to run.

    Attributes:
        config: derived for the arm.
        adapted: the resident model.
        shards: encoded for the arm's clients.
        start: the adapter every training starts from.
        run_id: of the run.
        folder: the arm's own.
        reporter: who watches.
        on_round: called after each round with its record and the state.
    """

    config: Config
    adapted: AdaptedModel
    shards: EncodedShards
    start: AdapterState
    run_id: str
    folder: Path
    reporter: Reporter
    on_round: Callable[[RoundRecord, ServerState], None] | None = None

    def for_client(self, client: int) -> Arm:
        """Return the same arm with a folder for one client's training."""
        return replace(self, folder=self.folder / f"client-{client:04d}", run_id=f"{self.run_id}-{client}")


def _rounds_over(folder: Path) -> int:
    names = [p.name for p in (folder / "checkpoints").glob("round-*")]
    return max((int(n.rsplit("-", 1)[-1]) for n in names), default=0)


def train(arm: Arm, only: int | None = None) -> Progress:
    """Run the rounds of an arm, or of one client alone, in this process.

    Raises:
        RunFailedError, CancelledError: as the round loop does.
    """
    method = methods.create(arm.config)
    runtime = Runtime(arm.config, arm.adapted, method, arm.shards, arm.reporter.step)

    def resident(context: Context) -> Runtime:
        return runtime

    grid = LocalGrid(client_app(resident), arm.config.federation.clients)
    faults = arm.config.federation.faults
    faulty = FaultyGrid(grid, faults, arm.config.seed) if any(faults.model_dump().values()) else grid

    def over(record: RoundRecord, state: ServerState) -> None:
        arm.reporter.round(record)
        if arm.on_round:
            arm.on_round(record, state)

    arm.reporter.training(arm.config.arm, arm.config.federation.rounds, _rounds_over(arm.folder))
    federation = Federation(
        config=arm.config,
        method=method,
        grid=faulty,
        registered=arm.shards.sizes,
        run_id=arm.run_id,
        folder=arm.folder,
        only=None if only is None else frozenset({only}),
        on_round=over,
    )
    return run_rounds(federation, ServerState(arm.start))
