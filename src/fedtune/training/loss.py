"""The loss of a step: one packed row without padding, logits only where a label is predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtune.data.encode import Encoded
from fedtune.models.attention import row_logits, text_weights
from fedtune.models.dropout import Keys, token_keys
from fedtune.models.head import has_plain_head, row_losses
from fedtune.models.packing import join, pack
from fedtune.models.proof import proof_of


@dataclass(frozen=True)
class Part:
    """One client's examples in a pass.

    Attributes:
        examples: at least one.
        share: what a label's loss counts for: one over the labels of the client's whole step.
        key: of what is random in the client's step.
        first: place of the first example in the step.
    """

    examples: Sequence[Encoded]
    share: float = 1.0
    key: int = 0
    first: int = 0

    @property
    def texts(self) -> list[tuple[int, ...]]:
        """Token ids of each example."""
        return [e.ids for e in self.examples]


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


def passes(steps: Sequence[Sequence[Encoded]], keys: Sequence[int], limit: int) -> Iterator[dict[int, Part]]:
    """Cut one step of each client into passes of about `limit` tokens in all; which examples form a step stays.

    Yields client's place -> its part.
    """

    def parts(examples: Sequence[Encoded], key: int) -> Iterator[Part]:
        share, first = 1.0 / sum(e.labels for e in examples), 0
        for run in micro_batches(examples, limit // len(steps)):
            yield Part(run, share, key, first)
            first += len(run)

    for row in zip_longest(*(parts(examples, key) for examples, key in zip(steps, keys, strict=True))):
        yield {place: part for place, part in enumerate(row) if part is not None}


def _labels(parts: Sequence[Part]) -> tuple[list[int], list[int], list[float]]:
    """Return, of all labels, the places in the joined texts that predict them, their tokens, and their shares."""
    keep: list[int] = []
    targets: list[int] = []
    shares: list[float] = []
    offset = 0
    for part in parts:
        for example in part.examples:
            keep += range(offset + example.start - 1, offset + len(example.ids) - 1)
            targets += example.ids[example.start :]
            shares += [part.share] * example.labels
            offset += len(example.ids)
    return keep, targets, shares


def lots(model: Any, parts: Sequence[Part]) -> list[list[Part]]:
    """Return parts as they pass through a model: all together, or each text alone where rows are not proven."""
    texts = [text for part in parts for text in part.texts]
    if len(texts) == 1 or proof_of(model).packs(texts):
        return [list(parts)]
    return [
        [replace(part, examples=[example], first=part.first + number)]
        for part in parts
        for number, example in enumerate(part.examples)
    ]


def regrouped(losses: Sequence[float], parts: Sequence[Part]) -> list[float]:
    """Return the parts' losses from those of their texts."""
    ends = [0, *accumulate(len(part.examples) for part in parts)]
    return [sum(losses[start:end]) for start, end in pairwise(ends)]


def joint_loss(
    model: Any,
    parts: Sequence[Part],
    *,
    share_prefix: bool = False,
    on_rows: Callable[[list[int]], None] | None = None,
) -> tuple[Tensor, list[float]]:
    """Return the sum over parts of share times summed cross-entropy, to be backpropagated, and each part's own.

    Samples never interact, so the gradient of each client's parameters is that of its own loss.

    Args:
        model: with its adapter, or with stacked ones that know the parts' borders.
        parts: of one client, or of several.
        share_prefix: compute what a part's texts begin with once: exact without dropout, not with it.
        on_rows: told how many tokens of the row each part has, before the pass.
    """
    apart = lots(model, parts)
    if len(apart) > 1:
        made = [joint_loss(model, lot) for lot in apart]
        return torch.stack([total for total, _ in made]).sum(), regrouped([own for _, (own,) in made], parts)
    keep, targets, shares = _labels(parts)
    plain = has_plain_head(model)
    with text_weights(model, [t for part in parts for t in part.texts], keep) as shareable:
        shared = share_prefix and shareable and not (model.training and proof_of(model).random)
        rows = [pack(part.texts, share_prefix=shared) for part in parts]
        if on_rows:
            on_rows([len(own.ids) for own in rows])
        row = join(rows) if len(rows) > 1 else rows[0]
        weight = next(model.parameters())
        precision = torch.float64 if weight.dtype == torch.float64 else torch.float32
        counted = torch.tensor(shares, dtype=precision, device=weight.device)
        if plain:
            total, each = row_losses(model, row, keep, targets, counted)
        else:
            wanted = torch.tensor(targets, device=weight.device)
            each = F.cross_entropy(row_logits(model, row, keep).to(counted.dtype), wanted, reduction="none")
            total = (each * counted).sum()
    sizes = [sum(e.labels for e in part.examples) for part in parts]
    split = torch.split(each.detach() * counted, sizes)
    return total, [float(own.sum()) for own in split]


def keyed(keys: Keys, parts: Sequence[Part], device: torch.device) -> Any:
    """Return the context in which a pass over the parts drops what its keys say."""
    lengths = [[len(e.ids) for e in part.examples] for part in parts]
    return keys.of(token_keys([p.key for p in parts], [p.first for p in parts], lengths, device))
