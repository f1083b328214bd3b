"""The loss of a step: one packed row without padding, logits only where a label is predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtune.config.section import Section
from fedtune.models.attention import row_logits, text_weights
from fedtune.models.dropout import Keys, token_keys
from fedtune.models.head import has_plain_head, row_losses
from fedtune.models.packing import join, pack, runs
from fedtune.models.proof import proof_of
from fedtune.objectives import CrossEntropy, Example, Objective

CROSS_ENTROPY = CrossEntropy(Section())
# told how many tokens of a row each part has, before the pass
OnRows = Callable[[list[int]], None]


@dataclass(frozen=True)
class Step:
    """One client's optimiser step: its examples, what they are trained by, and the key of what is random in it."""

    examples: Sequence[Example]
    objective: Objective[Any] = CROSS_ENTROPY
    key: int = 0


@dataclass(frozen=True)
class Part:
    """One client's examples in a pass.

    Attributes:
        examples: at least one.
        share: one over the weights of all examples of the client's step.
        key: of what is random in the client's step.
        first: place of the first text in the step.
        objective: what the examples are trained by.
    """

    examples: Sequence[Example]
    share: float = 1.0
    key: int = 0
    first: int = 0
    objective: Objective[Any] = CROSS_ENTROPY

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """Token ids of each text."""
        return [text.ids for example in self.examples for text in example.texts]

    @property
    def labels(self) -> int:
        """Labels of all texts."""
        return sum(example.labels for example in self.examples)

    def by_example(self) -> Iterator[Part]:
        """Yield each example as a part of its own."""
        first = self.first
        for example in self.examples:
            yield replace(self, examples=[example], first=first)
            first += len(example.texts)

    def by_text(self) -> Iterator[Part]:
        """Yield each text as a part of its own, which has no loss: that is the whole example's."""
        texts = [text for example in self.examples for text in example.texts]
        for place, text in enumerate(texts, self.first):
            yield replace(self, examples=[Example((text,))], first=place)

    def loss(self, logs: Tensor) -> Tensor:
        """Return the part's loss from the log-probabilities of its labels [labels]."""
        return self.objective.total(logs, self.examples, self.share)


def passes(steps: Sequence[Step], limit: int) -> Iterator[dict[int, Part]]:
    """Cut one step of each client into passes of about `limit` tokens in all; which examples form a step stays.

    Yields client's place -> its part.
    """

    def parts(step: Step) -> Iterator[Part]:
        share, first = 1.0 / sum(map(step.objective.weight, step.examples)), 0
        for run in runs(step.examples, lambda example: example.tokens, limit // len(steps)):
            yield Part(run, share, step.key, first, step.objective)
            first += sum(len(example.texts) for example in run)

    for row in zip_longest(*map(parts, steps)):
        yield {place: part for place, part in enumerate(row) if part is not None}


def _labels(parts: Sequence[Part]) -> tuple[list[int], list[int]]:
    """Return, of all labels, the places in the joined texts that predict them, and their tokens."""
    keep: list[int] = []
    targets: list[int] = []
    offset = 0
    for text in (text for part in parts for example in part.examples for text in example.texts):
        for start, end in text.spans:
            keep += range(offset + start - 1, offset + end - 1)
            targets += text.ids[start:end]
        offset += len(text.ids)
    return keep, targets


def in_one_row(model: Any, parts: Sequence[Part]) -> bool:
    """Tell whether the texts of some parts may lie in one row."""
    texts = [text for part in parts for text in part.texts]
    return len(texts) == 1 or proof_of(model).packs(texts)


def label_logs(
    model: Any, parts: Sequence[Part], *, share_prefix: bool = False, on_rows: OnRows | None = None
) -> Tensor:
    """Return the log-probabilities of all labels of parts, in order, as they are in one row [labels]."""
    keep, targets = _labels(parts)
    plain = has_plain_head(model)  # it may have to be tried, which is not done in the middle of a pass
    with text_weights(model, [t for part in parts for t in part.texts], keep) as shareable:
        shared = share_prefix and shareable and not (model.training and proof_of(model).random)
        rows = [pack(part.texts, share_prefix=shared) for part in parts]
        if on_rows:
            on_rows([len(own.ids) for own in rows])
        row = join(rows) if len(rows) > 1 else rows[0]
        weight = next(model.parameters())
        precision = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if plain:
            expected = [part.share for part in parts for _ in range(part.labels)]
            return -row_losses(model, row, keep, targets, torch.tensor(expected, dtype=precision, device=weight.device))
        wanted = torch.tensor(targets, device=weight.device)
        return -F.cross_entropy(row_logits(model, row, keep).to(precision), wanted, reduction="none")


def joint_loss(
    model: Any, parts: Sequence[Part], *, share_prefix: bool = False, on_rows: OnRows | None = None
) -> tuple[Tensor, list[float]]:
    """Return the sum of the losses of parts in one row, to be backpropagated, and each part's own.

    Samples never interact, so the gradient of each client's parameters is that of its own loss.

    Args:
        model: with its adapter, or with stacked ones that know the parts' borders.
        parts: of one client, or of several.
        share_prefix: compute what a part's texts begin with once: exact without dropout, not with it.
    """
    logs = label_logs(model, parts, share_prefix=share_prefix, on_rows=on_rows)
    each = torch.split(logs, [part.labels for part in parts])
    losses = [part.loss(own) for part, own in zip(parts, each, strict=True)]
    return torch.stack(losses).sum(), [float(loss.detach()) for loss in losses]


def keyed(keys: Keys, parts: Sequence[Part], device: torch.device) -> Any:
    """Return the context in which a pass over the parts drops what its keys say."""
    lengths = [[len(text) for text in part.texts] for part in parts]
    return keys.of(token_keys([p.key for p in parts], [p.first for p in parts], lengths, device))
