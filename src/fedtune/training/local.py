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
from fedtune.methods.base import Method
from fedtune.models.adapter import AdaptedModel, load_tensors
from fedtune.models.attention import packed_logits
from fedtune.training import schedule
from fedtune.types import derive_seed

OnStep = Callable[[int, int, float], None]
Slots = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class LocalResult:
    """What a client has after its local steps: the payload to send, and its counts.

    `loss` is the mean over steps of the mean cross-entropy of a step's labels, in nats.
    """

    payload: dict[str, Tensor]
    examples: int
    tokens: int
    steps: int
    loss: float


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


def _step_loss(model: Any, examples: Sequence[Encoded], limit: int, *, share_prefix: bool) -> float:
    """Backpropagate the mean loss over all labels of a step, whatever the micro-batches; return it."""
    labels = sum(e.labels for e in examples)
    total = 0.0
    for run in micro_batches(examples, limit):
        loss = label_loss(model, run, share_prefix=share_prefix) / labels
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    return total


def _select(slots: Slots, method: Method, round_: int) -> dict[str, torch.nn.Parameter]:
    """Switch gradients on for what the method trains in this round, and off for the rest."""
    chosen = {}
    for name, parameter in slots.items():
        parameter.grad = None
        parameter.requires_grad_(method.trainable(round_, name))
        if parameter.requires_grad:
            chosen[name] = parameter
    return chosen


def _optimizer(chosen: Slots, config: Config, rate: float) -> torch.optim.Optimizer:
    train = config.train
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
class _Steps:
    """Losses and token counts of the steps made."""

    losses: list[float]
    tokens: int


def _run_steps(
    model: Any,
    shard: Sequence[Encoded],
    plan: Sequence[Sequence[int]],
    chosen: Slots,
    term: Callable[[], Tensor | None],
    config: Config,
    rate: float,
    report: Callable[[int, float], None],
) -> _Steps:
    """Make the optimiser steps of one client: loss, the method's term, clipping, AdamW."""
    optimizer = _optimizer(chosen, config, rate)
    exact = config.lora.dropout == 0
    losses: list[float] = []
    total = 0
    for rows in plan:
        examples = [shard[i] for i in rows]
        optimizer.zero_grad(set_to_none=True)
        loss = _step_loss(model, examples, config.train.max_tokens_per_forward, share_prefix=exact)
        extra = term()
        if extra is not None:
            extra.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(chosen.values(), config.train.max_grad_norm)
        optimizer.step()
        tokens = sum(len(e.ids) for e in examples)
        losses.append(loss)
        total += tokens
        report(tokens, loss)
    return _Steps(losses, total)


def fit(
    adapted: AdaptedModel,
    shard: Sequence[Encoded],
    start: Mapping[str, Tensor],
    method: Method,
    config: Config,
    client: int,
    round_: int,
    on_step: OnStep | None = None,
) -> LocalResult:
    """Train one client for one round, starting from what it downloaded.

    Args:
        adapted: the resident model; its adapter is overwritten.
        shard: the client's examples, at least one.
        start: the downloaded tensors.
        method: its client half is used.
        config: the run's settings.
        client: whose shard; with the round it keys every random draw, so the result depends on nothing else.
        round_: which round.
        on_step: called with (client, tokens, loss) after each optimiser step.
    """
    train = config.train
    rate = schedule.learning_rate(train, round_, config.federation.rounds)
    plan = schedule.batches(train, len(shard), config.seed, client, round_)
    load_tensors(adapted.slots, start)
    chosen = _select(adapted.slots, method, round_)
    torch.manual_seed(derive_seed(config.seed, "dropout", client, round_))

    def report(tokens: int, loss: float) -> None:
        if on_step:
            on_step(client, tokens, loss)

    def term() -> Tensor | None:
        return method.loss_term(chosen, start)

    with _training(adapted.model, train.gradient_checkpointing):
        steps = _run_steps(adapted.model, shard, plan, chosen, term, config, rate, report)
    trained = {name: p.detach().to("cpu", copy=True) for name, p in adapted.slots.items()}
    distinct = len({i for rows in plan for i in rows})
    payload = method.payload(trained, start, round_)
    return LocalResult(payload, distinct, steps.tokens, len(plan), math.fsum(steps.losses) / len(steps.losses))
