"""The gradient of a step, pass by pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fedtune.config.section import Section
from fedtune.models.adapted import AdaptedModel
from fedtune.models.interface import attending
from fedtune.models.proof import proof_of
from fedtune.objectives import Example, Objective
from fedtune.training.loss import OnRows, Part, Step, in_one_row, joint_loss, keyed, label_logs, passes
from fedtune.types import derive_seed


@contextlib.contextmanager
def _passing(adapted: AdaptedModel, parts: Sequence[Part], exact: bool) -> Iterator[None]:
    """Let parts pass through the model and back, with the attention and the random draws that are theirs."""
    model, texts = adapted.model, [text for part in parts for text in part.texts]
    with contextlib.ExitStack() as during:
        during.enter_context(attending(model, packed=proof_of(model).packs(texts)))
        if not exact:
            during.enter_context(keyed(adapted.keys, parts, adapted.device))
        if model.training and proof_of(model).random:
            during.enter_context(torch.random.fork_rng())
            torch.manual_seed(derive_seed(parts[0].key, "own dropout", parts[0].first))
        yield


def _alone(adapted: AdaptedModel, part: Part, exact: bool) -> float:
    """Return the loss of one example, backpropagated; text by text where its texts cannot lie in one row.

    The derivatives of the loss by the labels' log-probabilities are known when all texts have passed; then each passes
    again for its gradient. So the activations of one text are kept at a time.
    """
    if in_one_row(adapted.model, [part]):
        return one_pass(adapted, [part], exact=exact)[0]
    texts = list(part.by_text())
    loss, slopes = _derivatives(part, _logs(adapted, texts, exact))
    for text, own in zip(texts, torch.split(slopes, [text.labels for text in texts]), strict=True):
        if torch.is_grad_enabled():
            with _passing(adapted, [text], exact):
                label_logs(adapted.model, [text]).backward(own)  # type: ignore[no-untyped-call]
    return loss


def _rows(model: Any, part: Part) -> list[Part]:
    """Return a part as it passes through a model without gradients: whole, by example, or by text."""
    if in_one_row(model, [part]):
        return [part]
    if len(part.examples) == 1:
        return list(part.by_text())
    return [row for example in part.by_example() for row in _rows(model, example)]


def _logs(adapted: AdaptedModel, parts: Sequence[Part], exact: bool) -> Tensor:
    """Return the log-probabilities of all labels of parts, each of which passes alone, without gradients [labels]."""
    made = []
    for part in parts:
        with torch.no_grad(), _passing(adapted, [part], exact):
            made.append(label_logs(adapted.model, [part], share_prefix=exact and len(part.texts) > 1))
    return torch.cat(made)


def _derivatives(part: Part, logs: Tensor) -> tuple[float, Tensor]:
    """Return a part's loss, and its derivatives by the log-probabilities of the labels [labels]."""
    with torch.enable_grad():
        loss = part.loss(logs.requires_grad_())
    return float(loss.detach()), torch.autograd.grad(loss, logs)[0]


@dataclass(frozen=True)
class _Known(Example):
    """An example, and the derivatives of its step's loss by its labels' log-probabilities [labels]."""

    slopes: Tensor


class _Linear(Objective[Section]):
    """The loss of a step of which the value and all derivatives are known."""

    def __init__(self, loss: float) -> None:
        super().__init__(Section())
        self._loss = loss

    def total(self, logs: Tensor, examples: Sequence[Example], share: float) -> Tensor:
        """Return the examples' shares of the loss, with its derivatives."""
        slopes = torch.cat([example.slopes for example in cast(Sequence[_Known], examples)])
        return ((logs - logs.detach()) * slopes).sum() + self._loss * len(examples) * share


def by_example(adapted: AdaptedModel, step: Step, tokens: int, *, exact: bool) -> Step:
    """Return a step with the same loss and gradient whose objective needs no more than one example at a time.

    Where that is not so already, all texts pass without gradients.
    """
    if not step.objective.whole_step:
        return step
    parts = [part for row in passes([step], tokens) for part in row.values()]
    logs = _logs(adapted, [row for part in parts for row in _rows(adapted.model, part)], exact)
    loss, slopes = _derivatives(Part(step.examples, parts[0].share, objective=step.objective), logs)
    each = torch.split(slopes, [example.labels for example in step.examples])
    known = [_Known(example.texts, own) for example, own in zip(step.examples, each, strict=True)]
    return Step(known, _Linear(loss), step.key)


def one_pass(
    adapted: AdaptedModel, parts: Sequence[Part], *, exact: bool, on_rows: OnRows | None = None
) -> list[float]:
    """Return each part's loss, of one pass if they may share one; backpropagated unless under `no_grad`."""
    if not in_one_row(adapted.model, parts):
        return [sum(_alone(adapted, example, exact) for example in part.by_example()) for part in parts]
    with _passing(adapted, parts, exact):
        loss, own = joint_loss(adapted.model, parts, share_prefix=exact, on_rows=on_rows)
        if torch.is_grad_enabled():
            loss.backward()  # type: ignore[no-untyped-call]
    return own


def backpropagate(adapted: AdaptedModel, step: Step, tokens: int, *, exact: bool) -> float:
    """Return the loss of one client's step, whatever the micro-batches; backpropagated unless under `no_grad`."""
    step = by_example(adapted, step, tokens, exact=exact)
    return sum(sum(one_pass(adapted, list(parts.values()), exact=exact)) for parts in passes([step], tokens))
