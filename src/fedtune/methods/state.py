"""What a method's server half works on: a client's update, the server's state, the run. No torch here."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from fedtune.methods.requests import Tensors

if TYPE_CHECKING:
    from torch import Tensor

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


@dataclass(frozen=True)
class Scene:
    """What a method may know of the run it is in.

    Attributes:
        seed: of everything that all parties draw alike.
        ranks: client -> rank, where clients have ranks of their own.
        rank: of the global adapter; 0 where there is no run.
        cohort: clients asked a round.
    """

    seed: int = 0
    ranks: Mapping[int, int] = field(default_factory=dict)
    rank: int = 0
    cohort: int = 1
