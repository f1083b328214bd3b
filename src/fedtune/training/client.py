"""One client's local work of one round, as methods see it; the base model stays where it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedtune import objectives
from fedtune.config import Config
from fedtune.lora.state import AdapterState
from fedtune.methods.requests import (
    ClientContext,
    Correction,
    Features,
    Gradients,
    Losses,
    Program,
    Request,
    RowNorms,
    Tensors,
    Train,
    handled,
)
from fedtune.models.adapted import AdaptedModel
from fedtune.models.attention import text_features
from fedtune.objectives import Example
from fedtune.training import schedule
from fedtune.training.executor import Jobs, Limits, Work, place
from fedtune.training.gradients import backpropagate
from fedtune.training.loss import Step
from fedtune.types import derive_seed

T = TypeVar("T")
OnStep = Callable[[int, int, float], None]


class LocalWork:
    """One client's work of one round on the resident model: it answers what a method's program asks for.

    Args:
        adapted: the resident model; its adapter is overwritten.
        shard: the client's examples, at least one.
        layout: the adapter of the client's rank, as the run's seed made it.
        kept: what the client kept to itself.
        config: the run's settings.
        key: (client, round, exchange); with the seed it keys every random draw, so the result depends on nothing else.
        on_step: called with (client, tokens, loss) after each optimiser step.
        tokens: of a pass at most.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        shard: Sequence[Example],
        layout: AdapterState,
        kept: Tensors,
        config: Config,
        key: tuple[int, int, int],
        on_step: OnStep | None = None,
        tokens: int = Limits.tokens,
    ) -> None:
        self._adapted, self._shard, self._config, self._on_step = adapted, shard, config, on_step
        self._tokens = tokens
        self._objective = objectives.build(config)
        self.client, self.round, self.phase = key
        self.layout, self.kept = layout, kept
        self.rate = schedule.learning_rate(config.train, self.round, config.federation.rounds)
        self.plan = schedule.batches(config.train, len(shard), config.seed, self.client, self.round)
        self.steps = len(self.plan)
        self.losses_seen: list[float] = []
        self.tokens = 0
        self.passes = 0

    @property
    def examples(self) -> int:
        """How many different examples the round's steps have."""
        return schedule.distinct(self.plan)

    def _examples(self, step: int) -> list[Example]:
        return [self._shard[i] for i in self.plan[step]]

    @property
    def context(self) -> ClientContext:
        """What the method knows of this client."""
        return ClientContext(self.client, self.round, self.phase, self.layout, self.kept, self.rate, self.steps)

    def run(self, program: Program[T]) -> Jobs[T]:
        """Run a method's program; what it trains is left to an executor, everything else is done on the spot."""
        return handled(program, self._handle)

    def _handle(self, request: Request) -> Jobs[Any]:
        match request:
            case Train():
                return (yield self._work(request))
            case Gradients(at, names):
                return self._gradients(at, names)
            case Losses(step, points):
                return self._losses(step, points)
            case Features(count):
                return self._features(count)
            case RowNorms(at):
                return self._adapted.row_norms(at)
        raise TypeError(f"a method asked for {type(request).__name__}, which is no request")

    def _work(self, request: Train) -> Work:
        """Return the round's optimiser steps; a second training in a round has dropout of its own."""
        more = (self.passes,) if self.passes else ()
        self.passes += 1
        before = len(self.losses_seen), self.tokens

        def again() -> None:
            del self.losses_seen[before[0] :]
            self.tokens = before[1]
            if isinstance(request.correction, Correction):
                request.correction.sums.clear()

        return Work(
            request,
            [self._examples(step) for step in range(self.steps)],
            self.rate,
            self._config.train,
            derive_seed(self._config.seed, "dropout", self.client, self.round, *more),
            self._exact,
            self._report,
            again,
            self._objective,
        )

    @property
    def _exact(self) -> bool:
        return self._config.lora.dropout == 0

    def _report(self, examples: Sequence[Example], loss: float) -> None:
        tokens = sum(example.tokens for example in examples)
        self.losses_seen.append(loss)
        self.tokens += tokens
        if self._on_step:
            self._on_step(self.client, tokens, loss)

    def _gradients(self, at: Tensors, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradient of the round's first step at a point."""
        chosen = place(self._adapted, at, names)
        examples = self._examples(0)
        step = Step(examples, self._objective)
        self._report(examples, backpropagate(self._adapted, step, self._tokens, exact=self._exact))
        return {n: (torch.zeros_like(p) if p.grad is None else p.grad).to("cpu", copy=True) for n, p in chosen.items()}

    @torch.no_grad()
    def _losses(self, step: int, points: Sequence[Tensors]) -> list[float]:
        """Return the loss of one of the round's steps at several points, without gradients."""
        examples = self._examples(step)
        found = []
        for point in points:
            self._adapted.load(point)
            found.append(backpropagate(self._adapted, Step(examples, self._objective), self._tokens, exact=True))
        self._report(examples, found[0])
        return found

    def _features(self, count: int) -> Tensor:
        """Return the base model's last hidden state [count, hidden] at the end of the first examples' prompts."""
        first = [example.texts[0] for example in self._shard[:count]]
        texts = [text.ids[: text.start] for text in first]
        return text_features(self._adapted.model, texts).float().cpu()

    @property
    def loss(self) -> float:
        """The mean over steps of the loss of a step; NaN before any."""
        return math.fsum(self.losses_seen) / len(self.losses_seen) if self.losses_seen else math.nan
