"""One client's local training in one round: its own optimiser, fresh; the base model stays where it is."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtune.config import Config
from fedtune.data.encode import Encoded
from fedtune.lora.state import AdapterState
from fedtune.methods.local import Tensors, Term
from fedtune.models.adapter import AdaptedModel
from fedtune.models.attention import packed_logits, text_features
from fedtune.training import schedule
from fedtune.types import derive_seed

OnStep = Callable[[int, int, float], None]
Slots = Mapping[str, torch.nn.Parameter]


def micro_batches(examples: Sequence[Encoded], limit: int) -> Iterator[list[Encoded]]:
    """Cut a step's examples into runs of at most `limit` tokens (a longer single one stands alone)."""
    run: list[Encoded] = []
    size = 0
    for example in examples:
        if run and size + len(example.ids) > limit:
            yield run
            run, size = [], 0
        run.append(example)
        size += len(example.ids)
    if run:
        yield run


def label_loss(model: Any, examples: Sequence[Encoded], *, share_prefix: bool = False) -> Tensor:
    """Return the summed cross-entropy of all labels; logits exist only where a label is predicted.

    `share_prefix` computes the prompt's common beginning once: exact without dropout, not with it.
    """
    keep: list[int] = []
    targets: list[int] = []
    offset = 0
    for example in examples:
        keep += range(offset + example.start - 1, offset + len(example.ids) - 1)
        targets += example.ids[example.start :]
        offset += len(example.ids)
    logits = packed_logits(model, [e.ids for e in examples], keep, share_prefix=share_prefix).float()
    return F.cross_entropy(logits, torch.tensor(targets, device=logits.device), reduction="sum")


def step_loss(model: Any, examples: Sequence[Encoded], limit: int, *, share_prefix: bool) -> float:
    """Backpropagate the mean loss over all labels of a step, whatever the micro-batches; return it."""
    labels = sum(e.labels for e in examples)
    total = 0.0
    for run in micro_batches(examples, limit):
        loss = label_loss(model, run, share_prefix=share_prefix) / labels
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def _select(slots: Slots, names: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    """Switch gradients on for what is trained, and off for the rest."""
    wanted = set(names)
    for name, parameter in slots.items():
        parameter.grad = None
        parameter.requires_grad_(name in wanted)
    return {name: slots[name] for name in names}


def _optimizer(chosen: Slots, config: Config, rate: float) -> torch.optim.Optimizer:
    train = config.train
    if train.optimizer == "sgd":
        return torch.optim.SGD(chosen.values(), lr=rate, weight_decay=train.weight_decay)
    return torch.optim.AdamW(
        chosen.values(),
        lr=rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
    )


@contextlib.contextmanager
def _training(model: Any, checkpointing: bool) -> Iterator[None]:
    """Put the model into training mode, with activations recomputed if asked, and back again."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        if checkpointing:
            model.gradient_checkpointing_disable()
        model.eval()


@dataclass(frozen=True)
class Extras:
    """What a method adds to plain steps: a term of the loss, masks and corrections of gradients, by name."""

    term: Term | None = None
    masks: Tensors | None = None
    correction: Tensors | None = None

    def apply(self, chosen: Slots) -> None:
        """Change the gradients that a step's loss has left."""
        extra = self.term(chosen) if self.term else None
        if extra is not None:
            extra.backward()  # type: ignore[no-untyped-call]
        for table, change in ((self.correction, torch.Tensor.add_), (self.masks, torch.Tensor.mul_)):
            for name, value in (table or {}).items():
                grad = chosen[name].grad if name in chosen else None
                if grad is not None:
                    change(grad, value.to(grad.device, grad.dtype))


class LocalWork:
    """One client's work of one round on the resident model; what methods see as `Local`.

    Args:
        adapted: the resident model; its adapter is overwritten.
        shard: the client's examples, at least one.
        layout: the adapter of the client's rank, as the run's seed made it.
        kept: what the client kept to itself.
        config: the run's settings.
        key: (client, round, exchange); with the seed it keys every random draw, so the result depends on nothing else.
        on_step: called with (client, tokens, loss) after each optimiser step.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        shard: Sequence[Encoded],
        layout: AdapterState,
        kept: Tensors,
        config: Config,
        key: tuple[int, int, int],
        on_step: OnStep | None = None,
    ) -> None:
        self._adapted, self._shard, self._config, self._on_step = adapted, shard, config, on_step
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
        return len({i for rows in self.plan for i in rows})

    def _place(self, start: Tensors, names: Sequence[str]) -> dict[str, torch.nn.Parameter]:
        self._adapted.load(start)
        return _select({**self._adapted.slots, **self._adapted.sides.parameters()}, names)

    def train(
        self,
        start: Tensors,
        names: Sequence[str],
        term: Term | None = None,
        masks: Tensors | None = None,
        correction: Tensors | None = None,
    ) -> dict[str, Tensor]:
        """Make the round's optimiser steps on `names` and return all tensors of the model afterwards."""
        chosen = self._place(start, names)
        more = (self.passes,) if self.passes else ()
        torch.manual_seed(derive_seed(self._config.seed, "dropout", self.client, self.round, *more))
        self.passes += 1
        with _training(self._adapted.model, self._config.train.gradient_checkpointing):
            self._run(chosen, Extras(term, masks, correction))
        return self._adapted.read(start)

    def _run(self, chosen: Slots, extras: Extras) -> None:
        """Make the optimiser steps: loss, the method's extras, clipping, the step."""
        optimizer = _optimizer(chosen, self._config, self.rate)
        for rows in self.plan:
            examples = [self._shard[i] for i in rows]
            optimizer.zero_grad(set_to_none=True)
            loss = self._step_loss(examples)
            extras.apply(chosen)
            torch.nn.utils.clip_grad_norm_(chosen.values(), self._config.train.max_grad_norm)
            optimizer.step()
            self._report(examples, loss)

    def _step_loss(self, examples: Sequence[Encoded]) -> float:
        exact = self._config.lora.dropout == 0
        limit = self._config.train.max_tokens_per_forward
        return step_loss(self._adapted.model, examples, limit, share_prefix=exact)

    def _report(self, examples: Sequence[Encoded], loss: float) -> None:
        tokens = sum(len(e.ids) for e in examples)
        self.losses_seen.append(loss)
        self.tokens += tokens
        if self._on_step:
            self._on_step(self.client, tokens, loss)

    def gradients(self, at: Tensors, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradient of the round's first step at a point."""
        chosen = self._place(at, names)
        examples = [self._shard[i] for i in self.plan[0]]
        self._report(examples, self._step_loss(examples))
        return {n: (torch.zeros_like(p) if p.grad is None else p.grad).to("cpu", copy=True) for n, p in chosen.items()}

    @torch.no_grad()
    def losses(self, step: int, points: Sequence[Tensors]) -> list[float]:
        """Return the loss of one of the round's steps at several points, without gradients."""
        examples = [self._shard[i] for i in self.plan[step]]
        found = []
        for point in points:
            self._adapted.load(point)
            found.append(self._plain_loss(examples))
        self._report(examples, found[0])
        return found

    def _plain_loss(self, examples: Sequence[Encoded]) -> float:
        limit = self._config.train.max_tokens_per_forward
        runs = micro_batches(examples, limit)
        total = sum(label_loss(self._adapted.model, run, share_prefix=True).item() for run in runs)
        return total / sum(e.labels for e in examples)

    def features(self, count: int) -> Tensor:
        """Return the base model's last hidden state [count, hidden] at the end of the first examples' prompts."""
        texts = [e.ids[: e.start] for e in self._shard[:count]]
        return text_features(self._adapted.model, texts).float().cpu()

    def row_norms(self, at: Tensors) -> dict[str, Tensor]:
        """Return ||W0 + s B A|| of each output row, by layer."""
        return self._adapted.row_norms(at)

    @property
    def loss(self) -> float:
        """The mean over steps of the mean cross-entropy of a step's labels, in nats; NaN before any."""
        return math.fsum(self.losses_seen) / len(self.losses_seen) if self.losses_seen else math.nan
