"""The arms of an experiment: federated, each client on its own, and all data in one place, matched by steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from fedtune import methods
from fedtune.config import Config
from fedtune.experiment.devices import RunSpec, reported
from fedtune.experiment.reporter import Reporter
from fedtune.federation.app import Runtime, jobs
from fedtune.federation.checkpoint import Progress, folders
from fedtune.federation.faults import FaultyGrid
from fedtune.federation.local import LocalGrid
from fedtune.federation.pool import LocalPool, Steps
from fedtune.federation.private import PrivateStore
from fedtune.federation.rounds import Federation, draw, rounds
from fedtune.federation.workers import WorkerGrid, WorkerPool, costs_of
from fedtune.lora.base_delta import as_adapter, join, side_tensors
from fedtune.lora.state import AdapterState, to_tensors, with_tensors
from fedtune.methods import Algorithm, ServerState
from fedtune.methods.requests import ClientContext, Request, RowNorms, answered
from fedtune.methods.traits import moves_base
from fedtune.models.adapted import AdaptedModel
from fedtune.models.budget import message_bytes
from fedtune.training.executor import Sequential
from fedtune.training.workload import EncodedShards, poisoned
from fedtune.types import RoundRecord

# a baseline's client is not hurried: longer than any training
AGES = 1e9


def _plain(config: Config, arm: str) -> Config:
    """Return the settings of an arm without federation: plain LoRA, nothing around it, nobody late."""
    default = Config(domain=config.domain)
    around = {key: getattr(default, key) for key in ("method", "drift", "server", "robust", "attack", "wrappers")}
    lora = config.lora.model_copy(update={"ranks": ()})
    calm = {"faults": default.federation.faults, "deadline": AGES, "min_clients": 1}
    federation = config.federation.model_copy(update=calm)
    return config.model_copy(update={"arm": arm, "lora": lora, "federation": federation, **around})


def derive(config: Config, arm: str) -> Config:
    """Return the settings of an arm.

    Centralised training is one client with all rows that makes, each round, as many steps as a whole cohort
    does; local-only keeps the federation's rounds and lets each client take part alone. Both train plain LoRA of the
    global rank, whatever the federated method is: they are what one would do without it. So they meet none of the
    federation's troubles either: no simulated faults, no deadline, no attackers.
    """
    if arm == "federated":
        return config.model_copy(update={"arm": arm})
    plain = _plain(config, arm)
    if arm == "local-only":
        return plain
    steps = config.train.max_steps * config.federation.cohort_size
    federation = plain.federation.model_copy(update={"clients": 1, "fraction": 1.0})
    return plain.model_copy(
        update={
            "federation": federation,
            "train": config.train.model_copy(update={"max_steps": steps}),
            "data": config.data.model_copy(update={"partition": "iid"}),
        }
    )


def wire(config: Config, start: AdapterState) -> Callable[[int], int] | None:
    """Return what tells how many bytes a cohort exchanges in a round; None where that depends on the run's course."""
    algorithm = methods.create(config)
    state = algorithm.initial(start)
    first = algorithm.upload(state, 0, 1)
    if moves_base(type(algorithm.method)) or first.ragged or first.once:
        return None
    everybody = np.arange(config.federation.clients)
    # clients of one rank exchange the same number of bytes
    rank_of = algorithm.method.run.ranks.get
    some = {rank_of(c): c for c in everybody.tolist()}
    down = {rank: message_bytes(algorithm.view(state, c)) for rank, c in some.items()}

    def ranks(round_: int) -> Mapping[int | None, int]:
        if len(some) == 1:  # then who is drawn does not matter
            return dict.fromkeys(some, config.federation.cohort_size)
        return Counter(rank_of(c) for c in draw(config, everybody, round_))

    def exchanged(round_: int) -> int:
        return sum(
            count * (down[rank] + message_bytes(algorithm.upload(state, some[rank], round_).tensors))
            for rank, count in ranks(round_).items()
        )

    return exchanged


@dataclass(frozen=True)
class Arm:
    """One training of an experiment, ready to run, with settings, shards and a folder of its own.

    Every training of it starts from `start`; `on_round` is called after each round with its record and the state.
    """

    config: Config
    adapted: AdaptedModel
    shards: EncodedShards
    start: AdapterState
    run_id: str
    folder: Path
    reporter: Reporter
    pool: LocalPool | WorkerPool
    on_round: Callable[[RoundRecord, ServerState], None] | None = None

    @property
    def private(self) -> PrivateStore:
        """What the arm's clients keep to themselves."""
        return PrivateStore(self.folder / "clients", self.config.federation.keep_checkpoints)

    @property
    def algorithm(self) -> Algorithm:
        """The method, with what is around it."""
        return methods.create(self.config)

    def shared_model(self, state: ServerState) -> dict[str, Tensor]:
        """Return the tensors of the global model: the adapter, and what was moved into the base."""
        return self._loadable({**to_tensors(state.adapter), **side_tensors(join(state.base))})

    def own_model(self, state: ServerState, client: int, after: int) -> dict[str, Tensor]:
        """Return the tensors of a client's own model after a round: what it would start the next one from.

        A run that was cut off may have left what clients kept in later rounds.
        """
        algorithm, next_round = self.algorithm, after + 1
        layout = algorithm.method.cut(self.start, client)
        kept = self.private.load(client, (next_round, 1))
        context = ClientContext(client, next_round, 1, layout, kept, rate=0.0, steps=0)
        return self._loadable(algorithm.begin(context, algorithm.view(state, client)))

    def _loadable(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of a model as PEFT has them."""

        def answer(request: Request) -> dict[str, Tensor]:
            if not isinstance(request, RowNorms):
                raise TypeError(f"only row norms can be asked of a model that is not trained, not {request}")
            return self.adapted.row_norms(request.at)

        return answered(self.algorithm.loadable(tensors), answer)

    def adapter_of(self, state: ServerState) -> AdapterState:
        """Return the global model as one PEFT adapter, of whatever rank that takes."""
        adapter = with_tensors(state.adapter, self._loadable(to_tensors(state.adapter)))
        return as_adapter(adapter, state.base)

    def for_client(self, client: int) -> Arm:
        """Return the same arm with a folder for one client's training."""
        return replace(self, folder=self.folder / f"client-{client:04d}", run_id=f"{self.run_id}-{client}")


def _key(arm: Arm) -> str:
    """Return by what a worker pool knows an arm's clients."""
    return f"{arm.run_id}/{arm.config.arm}"


def _grid(arm: Arm, algorithm: Algorithm, only: int | None) -> LocalGrid:
    """Return the clients: in this process, or in a worker pool, whose workers get what is asked for and no more."""
    clients = arm.config.federation.clients
    shards = poisoned(arm.shards, arm.config)
    pool = arm.pool
    if isinstance(pool, WorkerPool):
        key = _key(arm)
        asked = shards if only is None else shards.of(only)
        pool.workers.prepare(key, RunSpec(arm.config, arm.folder, arm.start, asked))
        means = {c: sum(e.tokens for e in shard) / max(1, len(shard)) for c, shard in enumerate(arm.shards.shards)}
        return WorkerGrid(pool, key, clients, costs_of(means), reported(arm.reporter))
    executor = pool.executor or Sequential(arm.adapted)
    runtime = Runtime(arm.config, arm.adapted, algorithm, arm.start, shards, executor, arm.private, arm.reporter.step)
    return LocalGrid(jobs(runtime), clients, pool=pool)


def train(arm: Arm, only: int | None = None) -> Steps[Progress]:
    """Run the rounds of an arm, or of one client alone, in this process; it raises what the round loop does."""
    algorithm = arm.algorithm
    grid = _grid(arm, algorithm, only)
    faults = arm.config.federation.faults
    faulty = FaultyGrid(grid, faults, arm.config.seed) if any(faults.model_dump().values()) else grid

    def over(record: RoundRecord, state: ServerState) -> None:
        arm.reporter.round(record)
        if arm.on_round:
            arm.on_round(record, state)

    arm.reporter.training(arm.config.arm, arm.config.federation.rounds, max(folders(arm.folder), default=0))
    federation = Federation(
        config=arm.config,
        algorithm=algorithm,
        grid=faulty,
        registered=arm.shards.sizes,
        run_id=arm.run_id,
        folder=arm.folder,
        only=None if only is None else frozenset({only}),
        on_round=over,
        on_note=arm.reporter.note,
    )
    try:
        return (yield from rounds(federation, algorithm.initial(arm.start)))
    finally:
        if isinstance(arm.pool, WorkerPool):
            arm.pool.workers.release(_key(arm))
