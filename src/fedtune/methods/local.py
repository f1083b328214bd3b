"""What a method sees of the client it runs on: training, gradients and losses, never the model itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.lora.state import AdapterState

Tensors = Mapping[str, "Tensor"]
Term = Callable[[Tensors], "Tensor | None"]


class Correction(dict[str, "Tensor"]):
    """What is added to the clipped gradients of every step, by name; it also sums up the gradients before that.

    Attributes:
        sums: by name, the sum over the steps so far of clipped gradients with weight decay.
    """

    def __init__(self, terms: Tensors) -> None:
        super().__init__(terms)
        self.sums: dict[str, Tensor] = {}

    def count(self, name: str, gradient: Tensor) -> None:
        """Add one step's gradient."""
        self.sums[name] = self.sums[name] + gradient if name in self.sums else gradient.clone()


@dataclass(frozen=True)
class Fitted:
    """What a client has after a round.

    Attributes:
        payload: what it sends.
        kept: what it keeps to itself until its next round; never sent.
    """

    payload: dict[str, Tensor]
    kept: dict[str, Tensor] = field(default_factory=dict)


class Local(Protocol):
    """One client's work of one round, as a method sees it.

    Attributes:
        client, round, phase: who, when, and which exchange of the round (from 1).
        layout: the adapter of this client's rank as the run's seed made it.
        kept: what the client kept in its last round (or exchange).
        rate: the round's learning rate.
        steps: how many optimiser steps a round has.
    """

    client: int
    round: int
    phase: int
    layout: AdapterState
    kept: Tensors
    rate: float
    steps: int

    def train(
        self,
        start: Tensors,
        names: Sequence[str],
        term: Term | None = None,
        masks: Tensors | None = None,
        correction: Tensors | None = None,
    ) -> dict[str, Tensor]:
        """Make the round's optimiser steps on `names` and return all tensors of the model afterwards.

        Args:
            start: all tensors of the model.
            names: those to train.
            term: added to each step's loss.
            masks: by name, multiplied into gradients (1 trains, 0 freezes: what is frozen stays bit for bit).
            correction: by name, added to the clipped gradients before the step (SCAFFOLD's c - c_i); a `Correction`
                also learns what they were.
        """
        ...

    def gradients(self, at: Tensors, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradient of the round's first step at a point."""
        ...

    def features(self, count: int) -> Tensor:
        """Return the base model's last hidden state [count, hidden] at the end of the first examples' prompts."""
        ...

    def row_norms(self, at: Tensors) -> dict[str, Tensor]:
        """Return ||W0 + s B A|| of each output row, by layer (for DoRA)."""
        ...

    def losses(self, step: int, points: Sequence[Tensors]) -> list[float]:
        """Return the loss of one of the round's steps at several points, without gradients."""
        ...
