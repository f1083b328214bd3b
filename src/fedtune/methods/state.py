"""What a method's server half works on: a client's update, the server's state, the run. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from fedtune.lora.algebra import weighted_mean
from fedtune.methods.requests import Tensors
from fedtune.methods.sound import GROWTH, Reach

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config.schema import TrainSettings
    from fedtune.lora.base_delta import Piece
    from fedtune.lora.state import AdapterState


@dataclass(frozen=True)
class ClientUpdate:
    """One client's screened update.

    Attributes:
        client: who.
        tensors: what it sent, by name.
        examples: its weight: how many it trained on, or what a robust rule gives it.
        steps: optimiser steps it made.
        loss: its mean over the steps, in nats; None where it said none.
        version: the round whose state it started from; the state before a round is that of the round before.
    """

    client: int
    tensors: Tensors
    examples: float
    steps: int = 0
    loss: float | None = None
    version: int = 0


def weights(updates: Sequence[ClientUpdate]) -> list[float]:
    """Return the weight of each update; they need not sum to 1."""
    return [float(u.examples) for u in updates]


def mean(updates: Sequence[ClientUpdate]) -> dict[str, Tensor]:
    """Return the weighted mean of the updates' tensors, by name."""
    return weighted_mean((u.tensors for u in updates), weights(updates))


@dataclass(frozen=True)
class Upload:
    """What a client has to send in an exchange.

    Attributes:
        tensors: with the names, shapes and dtypes that it must send, and about the size.
        whole: makes a whole adapter of what was sent: what is not sent is as the server has it.
        losses: how many losses the client takes at most.
        growth: by how much the Frobenius norm of a tensor may exceed that in `tensors`, by name.
        product: by how much that of a layer's product may exceed that of the server's, by path.
        problem: says what else is wrong with tensors of these names and dtypes, or returns an empty string.
        reach: how far a round at a learning rate can carry a weight of the model; None where nobody can say.
        ragged: the shapes are the client's own choice, within what `problem` allows.
        once: later rounds send something else, of another size.
    """

    tensors: Tensors
    whole: Callable[[Tensors], AdapterState]
    losses: int = 0
    growth: Callable[[str], float] = lambda name: GROWTH
    product: Callable[[str], float] = lambda path: GROWTH**2
    problem: Callable[[Tensors], str] = lambda sent: ""
    reach: Callable[[TrainSettings, float], Reach] | None = None
    ragged: bool = False
    once: bool = False


@dataclass(frozen=True)
class ServerState:
    """What the server carries from round to round; all of it is in the checkpoint.

    Attributes:
        adapter: the global adapter.
        round: the last round that is in it (0: untouched).
        extra: a stateful method's own tensors, by name.
        memory: the wrappers' tensors, by the wrapper's name.
        base: low-rank changes of the base model, in the order they were made; see `lora.base_delta`.
    """

    adapter: AdapterState
    round: int = 0
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    base: tuple[Piece, ...] = ()
    memory: Mapping[str, Tensors] = field(default_factory=dict)

    def carried(self) -> dict[str, Tensor]:
        """Return the method's and the wrappers' tensors by one name each, for a checkpoint."""
        return {**self.extra, **{f"{owner}/{n}": t for owner, own in self.memory.items() for n, t in own.items()}}

    def carrying(self, tensors: Tensors, owners: Container[str]) -> ServerState:
        """Return the state with what `carried` returned; the wrappers are `owners`."""
        memory: dict[str, dict[str, Tensor]] = {}
        extra = dict(tensors)
        for name in tensors:
            owner, _, own = name.partition("/")
            if owner in owners:
                memory.setdefault(owner, {})[own] = extra.pop(name)
        return replace(self, extra=extra, memory=memory)


class Sizes(NamedTuple):
    """Numbers of one module's A, B, of its rank and of a round's clients, to reckon traffic with."""

    a: int
    b: int
    rank: int
    clients: int


Note = Callable[[str], object]


def unheard(text: str) -> None:
    """Take a note that nobody reads."""


@dataclass(frozen=True)
class RoundContext:
    """What the server knows of a round beside its updates.

    Attributes:
        round: its number.
        refused: how many more replies were refused for what they hold.
        note: takes remarks for the round's record.
    """

    round: int
    refused: int = 0
    note: Note = unheard


@dataclass(frozen=True)
class RunContext:
    """What a method may know of the run it is in.

    Attributes:
        seed: of everything that all parties draw alike.
        ranks: client -> rank, where clients have ranks of their own.
        rank: of the global adapter; 0 where there is no run.
        cohort: clients asked per round.
    """

    seed: int = 0
    ranks: Mapping[int, int] = field(default_factory=dict)
    rank: int = 0
    cohort: int = 1
