"""What an objective is: how a row becomes an example of one or more texts, and the loss of that example."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from fedtune.config import Config
from fedtune.config.section import Section
from fedtune.data.check import TrainRow
from fedtune.data.encode import Encoder, Text
from fedtune.types import Problem

if TYPE_CHECKING:
    from torch import Tensor

P = TypeVar("P", bound=Section)


@dataclass(frozen=True)
class Example:
    """What one loss is computed from: the texts of one row, each with at least one label.

    An objective that needs to know more of an example derives a class of its own.
    """

    texts: tuple[Text, ...]

    @staticmethod
    def labelled(ids: Sequence[int], start: int) -> Example:
        """Return an example of one text whose labels are all tokens from `start` on."""
        return Example((Text.labelled(ids, start),))

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return sum(len(text.ids) for text in self.texts)

    @property
    def labels(self) -> int:
        """Labels of all texts."""
        return sum(text.labels for text in self.texts)


class Objective(Generic[P]):
    """What training minimises: the mean over a step's examples of a loss of their labels' log-probabilities.

    The loss of an example is a function of its own labels' log-probabilities and of nothing else in the step. So it is
    the same however a step is cut into passes, and whoever's texts share a pass. An objective of which that is not true
    says so by `whole_step`, and its texts pass twice: for the log-probabilities, then for the gradients.

    Attributes:
        name: as in `objective.name`.
        title: for people.
        paper: where it is from.
        columns: columns of text that a row has to have beside question and answer.
        texts: of an example at most.
        whole_step: whether the loss depends on all examples of a step together, as `total` says.
        least: the smallest loss that there can be; a client that reports a smaller one is not believed.
        Parameters: its own settings.

    Args:
        parameters: its own settings, validated.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str] = ""
    columns: ClassVar[tuple[str, ...]] = ()
    texts: ClassVar[int] = 1
    whole_step: ClassVar[bool] = False
    least: ClassVar[float] = 0.0

    class Parameters(Section):
        """None."""

    def __init__(self, parameters: P) -> None:
        self.parameters = parameters

    @classmethod
    def problems(cls, config: Config) -> Iterable[Problem]:
        """Yield what settings it does not go together with; none by default."""
        return ()

    def encode(self, row: TrainRow, encoder: Encoder) -> Example:
        """Return a row's texts, uncut; by default one, whose labels are the answers."""
        return Example((encoder.text(encoder.turns(row)),))

    def weight(self, example: Example) -> float:
        """Return what an example counts for in the mean over a step; above 0, and by default 1."""
        return 1.0

    def loss(self, logs: Sequence[Tensor], example: Example) -> Tensor:
        """Return the loss of an example, a number that can be differentiated.

        Args:
            logs: for each of its texts the log-probabilities of its labels [labels], in nats; float32, or float64 where
                the model is.
            example: whose they are.
        """
        raise NotImplementedError

    def total(self, logs: Tensor, examples: Sequence[Example], share: float) -> Tensor:
        """Return the sum of some examples' losses, each times `share`.

        Args:
            logs: log-probabilities of all their labels, in order [labels].
            examples: at least one; with `whole_step` all of the step.
            share: one over the weights of all examples of the step.
        """
        own = zip(by_text(logs, examples), examples, strict=True)
        losses = [self.weight(example) * self.loss(texts, example) for texts, example in own]
        return sum(losses[1:], losses[0]) * share


def by_text(logs: Tensor, examples: Sequence[Example]) -> list[list[Tensor]]:
    """Return for each example the log-probabilities of each of its texts' labels, from those of all in order."""
    sizes = [text.labels for example in examples for text in example.texts]
    each = iter(logs.split(sizes))  # type: ignore[no-untyped-call]
    return [[next(each) for _ in example.texts] for example in examples]
