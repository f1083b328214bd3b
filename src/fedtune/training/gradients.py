"""The gradient of a step, pass by pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fedtune.config.section import Section
from fedtune.models.adapted import AdaptedModel
from fedtune.models.interface import attending
from fedtune.models.proof import proof_of
from fedtune.objectives import Example, Objective
from fedtune.training.loss import Part, Step, groups, in_one_row, joint_loss, keyed, label_logs, passes, regrouped
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


def _one_group(
    adapted: AdaptedModel, parts: Sequence[Part], exact: bool, on_rows: Callable[[list[int]], None] | None
) -> list[float]:
    """Backpropagate the losses of parts that pass through the model together; return each part's."""
    if not in_one_row(adapted.model, parts):
        return [_text_by_text(adapted, part, exact) for part in parts]
    with _passing(adapted, parts, exact):
        loss, own = joint_loss(adapted.model, parts, share_prefix=exact, on_rows=on_rows)
        loss.backward()  # type: ignore[no-untyped-call]
    return own


def _text_by_text(adapted: AdaptedModel, part: Part, exact: bool) -> float:
    """Backpropagate the loss of a part whose texts cannot lie in one row; return it.

    The derivatives of the loss by the labels' log-probabilities are known when all texts have passed; then each passes
    again for its gradient. So the activations of one text are kept at a time.
    """
    texts = list(part.by_text())
    loss, slopes = _derivatives(part, _logs(adapted, texts, exact))
    for text, own in zip(texts, torch.split(slopes, [text.labels for text in texts]), strict=True):
        with _passing(adapted, [text], exact):
            label_logs(adapted.model, [text]).backward(own)  # type: ignore[no-untyped-call]
    return loss


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
    apart = [part for each in parts for (part,) in groups(adapted.model, [each])]
    rows = [[part] if in_one_row(adapted.model, [part]) else list(part.by_text()) for part in apart]
    logs = _logs(adapted, [part for row in rows for part in row], exact)
    loss, slopes = _derivatives(Part(step.examples, parts[0].share, objective=step.objective), logs)
    each = torch.split(slopes, [example.labels for example in step.examples])
    known = [_Known(example.texts, own) for example, own in zip(step.examples, each, strict=True)]
    return Step(known, _Linear(loss), step.key)


def one_pass(
    adapted: AdaptedModel, parts: Sequence[Part], *, exact: bool, on_rows: Callable[[list[int]], None] | None = None
) -> list[float]:
    """Backpropagate the losses of some parts of steps, in one pass if they may; return each part's."""
    apart = groups(adapted.model, parts)
    losses = [_one_group(adapted, group, exact, on_rows) for group in apart]
    return losses[0] if len(apart) == 1 else regrouped([own for (own,) in losses], parts)


def backpropagate(adapted: AdaptedModel, step: Step, tokens: int, *, exact: bool) -> float:
    """Backpropagate the loss of one client's step, whatever the micro-batches; return it."""
    step = by_example(adapted, step, tokens, exact=exact)
    return sum(sum(one_pass(adapted, list(parts.values()), exact=exact)) for parts in passes([step], tokens))
