"""What a method may ask of the client it runs on: training, gradients, losses and features, never the model itself.

The client half of a method is a generator: it yields requests, is resumed with their answers, and returns what it
sends and keeps. Whoever runs it decides when a request is done, so the training of many clients can share one pass.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.lora.state import AdapterState

T = TypeVar("T")
Y = TypeVar("Y")
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
class Train:
    """Make the round's optimiser steps; the answer is all tensors of the model afterwards.

    Attributes:
        start: all tensors of the model.
        names: of those that are trained.
        term: added to each step's loss.
        masks: by name, multiplied into gradients (1 trains, 0 freezes: what is frozen stays bit for bit).
        correction: by name, added to the clipped gradients before the step (SCAFFOLD's c - c_i); a `Correction` also
            learns what they were.
    """

    start: Tensors
    names: Sequence[str]
    term: Term | None = None
    masks: Tensors | None = None
    correction: Tensors | None = None


@dataclass(frozen=True)
class Gradients:
    """Take the gradient of the mean loss of the round's first step at a point; the answer is a tensor by name."""

    at: Tensors
    names: Sequence[str]


@dataclass(frozen=True)
class Losses:
    """Take the mean loss of one of the round's steps at several points; the answer is a list of floats, in nats."""

    step: int
    points: Sequence[Tensors]


@dataclass(frozen=True)
class Features:
    """Read the base model's last hidden states at the end of the first prompts; the answer is [count, hidden]."""

    count: int


@dataclass(frozen=True)
class RowNorms:
    """Take ||W0 + s B A|| of each output row (for DoRA); the answer is a tensor [out] by layer."""

    at: Tensors


Request = Train | Gradients | Losses | Features | RowNorms
Program = Generator[Request, Any, T]


@dataclass(frozen=True)
class Fitted:
    """What a client has after a round.

    Attributes:
        payload: what it sends.
        kept: what it keeps to itself until its next round; never sent.
    """

    payload: dict[str, Tensor]
    kept: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ClientContext:
    """What a method knows of the client it runs on.

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


def answered(program: Program[T], answer: Callable[[Request], Any]) -> T:
    """Return what a program returns whose requests are answered on the spot."""
    try:
        request = next(program)
        while True:
            request = program.send(answer(request))
    except StopIteration as done:
        result: T = done.value
        return result


def handled(program: Program[T], handle: Callable[[Request], Generator[Y, Any, Any]]) -> Generator[Y, Any, T]:
    """Run a program whose requests are answered by `handle`, which may make requests of its own.

    An exception of `handle` is raised in the program, where it asked.
    """
    with closing(program):
        try:
            request = next(program)
            while True:
                try:
                    answer = yield from handle(request)
                except Exception as err:
                    request = program.throw(err)
                else:
                    request = program.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result
