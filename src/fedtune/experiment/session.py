"""What all arms of a run share, and how their models are evaluated."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedtune.config import Config, Settings
from fedtune.domains.base import Task
from fedtune.evaluation.metrics import mean_score
from fedtune.evaluation.run import evaluate_all
from fedtune.experiment.arms import Arm
from fedtune.experiment.evaluate import identity
from fedtune.experiment.folder import RunFolder
from fedtune.experiment.reporter import Reporter
from fedtune.federation.pool import LocalPool
from fedtune.federation.workers import WorkerPool
from fedtune.io import digest
from fedtune.lora.state import AdapterState
from fedtune.methods.state import ServerState
from fedtune.models.adapted import AdaptedModel
from fedtune.models.merge import folded
from fedtune.results import schema

Scored = tuple[list[schema.Score], dict[str, list[float | None]]]


@dataclass
class Session:
    """What all arms of a run share: its folder, the resident model, the tasks, and who watches."""

    settings: Settings
    run: RunFolder
    adapted: AdaptedModel
    start: AdapterState
    tasks: tuple[Task, ...]
    reporter: Reporter
    pool: LocalPool | WorkerPool

    @property
    def config(self) -> Config:
        """The run's settings."""
        return self.settings.config

    def evaluate(self, tensors: Mapping[str, Tensor] | None, where: str) -> list[schema.Score]:
        """Evaluate the base model (None) or a model's tensors on all tasks, logging under `evals/<where>/`."""
        started = time.monotonic()
        model, tokenizer = self.adapted.model, self.adapted.base.tokenizer
        target = self.run.path / "evals" / where
        who, shown = identity(self.adapted.base, self.config), self.reporter.evaluating
        model.eval()
        if tensors is not None:
            self.adapted.load(tensors)
            # what the same tensors compute depends on the adapter's scale and on what the method puts beside it
            how = {key: self.config.plain()[key] for key in ("peft", "lora", "method")}
            who = [who, how, {n: _sha256(t) for n, t in tensors.items()}]
        with self.adapted.as_base() if tensors is None else folded(self.adapted):
            scores = evaluate_all(model, tokenizer, self.tasks, self.config, target, digest(who), shown)
        self.run.add_seconds("evaluation", time.monotonic() - started)
        return scores

    def evaluate_state(self, arm: Arm, state: ServerState, after: int, where: str) -> Scored:
        """Evaluate the global model after a round, or each client's where the method has no single one."""
        if arm.algorithm.method.models == "global":
            return self.evaluate(arm.shared_model(state), where), {}
        own = OwnModels(self, where)
        for client, examples in arm.shards.sizes.items():
            if examples:
                own.evaluate(client, arm.own_model(state, client, after))
        return own.scored()


class OwnModels:
    """Evaluates the clients' own models, one after the other."""

    def __init__(self, session: Session, where: str) -> None:
        self._session, self._where = session, where
        self._scores: dict[str, list[schema.Score]] = {}
        self._logs: dict[str, list[Path]] = {}

    def evaluate(self, client: int, tensors: Mapping[str, Tensor]) -> None:
        """Evaluate one client's model."""
        folder = f"{self._where}/client-{client:04d}"
        for score in self._session.evaluate(tensors, folder):
            log = self._session.run.path / "evals" / folder / f"{score.task}.{score.mode}.jsonl"
            self._scores.setdefault(score.key, []).append(score)
            self._logs.setdefault(score.key, []).append(log)

    def scored(self) -> Scored:
        """Return the means over clients, and each one's scores."""
        means = [mean_score(scores, self._logs[key]) for key, scores in self._scores.items()]
        return means, {key: [s.score for s in scores] for key, scores in self._scores.items()}


def _sha256(tensor: Tensor) -> str:
    # NumPy has no numbers of 16 bits with 8 of them for the exponent, so the bytes are taken as bytes
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
