"""Cross-entropy: minus the mean log-probability of all labels of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune.config.section import Section
from fedtune.objectives.base import Example, Objective

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(Objective[Section]):
    """Supervised fine-tuning on the answers."""

    name = "cross-entropy"
    title = "Cross-entropy of the answers' tokens"

    def weight(self, example: Example) -> float:
        """Return how many labels it has: each counts the same, in a short answer and in a long one."""
        return float(example.labels)

    def loss(self, logs: Sequence[Tensor], example: Example) -> Tensor:
        """Return the mean over the example's labels."""
        total: Tensor = sum(each.sum() for each in logs)  # type: ignore[assignment]
        return -total / example.labels

    def total(self, logs: Tensor, examples: Sequence[Example], share: float) -> Tensor:
        """Return the same as for any objective, in one sum over labels."""
        return -(logs * share).sum()
