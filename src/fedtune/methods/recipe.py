"""A method inside its wrappers: what the round loop and the clients really call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune import spaces
from fedtune.config import Config
from fedtune.methods import sound
from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors
from fedtune.methods.state import ClientUpdate, ServerState
from fedtune.methods.wrappers import Innermost, RoundContext, Wrapper, wrapped
from fedtune.methods.wrappers.base import Note, unheard
from fedtune.types import UpdateError

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.lora.state import AdapterState


class Recipe:
    """A method and the wrappers that a run's settings ask for."""

    def __init__(self, method: Method, config: Config) -> None:
        self.method, self.config = method, config
        self.outer = wrapped(method, config)

    @property
    def exact_dora(self) -> bool:
        """Whether magnitudes travel through the exact map."""
        return self.config.lora.dora and self.method.dora == "exact"

    @property
    def varying(self) -> bool:
        """Whether the bytes of a round depend on the rounds before it."""
        kind = self.method
        return kind.keeps_base or kind.ragged or kind.phases > 1 or (kind.stateful and kind.private)

    @property
    def streams(self) -> bool:
        """Whether updates may be added up as they come: nothing compares them, and nothing else comes with them."""
        layer: Innermost = self.outer
        streams = self.method.running and not self.method.by_client and layer.streams
        while streams and isinstance(layer, Wrapper):
            layer = layer.inner
            streams = layer.streams
        return streams

    def shortage(self, updates: int, refused: int = 0) -> str:
        """Say that there are too few updates for a robust rule to mean anything, or return an empty string.

        Args:
            updates: of the round that can be used.
            refused: how many more were refused for what they hold.
        """
        return self.outer.shortage(updates, refused)

    @property
    def phases(self) -> int:
        """Exchanges a round."""
        return self.method.phases

    def initial(self, adapter: AdapterState) -> ServerState:
        """Return the server's state before the first round."""
        from fedtune.lora.state import kept

        return ServerState(self.outer.initial(kept(adapter)))

    def begin(self, layout: AdapterState, download: Tensors, kept: Tensors, round_: int) -> dict[str, Tensor]:
        """Return all tensors of a client's model at the start of a round; magnitudes are relative under exact DoRA."""
        return self.outer.begin(ClientContext(-1, round_, 1, layout, kept, 0.0, 0), download)

    def fit(self, client: ClientContext, download: Tensors) -> Program[Fitted]:
        """Do a client's work of one exchange."""
        return self.outer.fit(client, download, self.outer.begin(client, download))

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Return what a client downloads."""
        from fedtune.lora.state import as_sent

        return as_sent(state.adapter, self.outer.view(state, client))

    def expected(self, state: ServerState, client: int, round_: int) -> dict[str, Tensor]:
        """Return tensors with the names, shapes and dtypes that a client must send, and about the size."""
        from fedtune.lora.state import as_sent

        return as_sent(state.adapter, self.outer.expected(state, client, round_))

    def growth(self, name: str) -> float:
        """Return by how much the norm of a tensor that a client sends may exceed that of what is expected."""
        return self.outer.growth(name)

    def flaw(
        self, update: Tensors, state: ServerState, client: int, round_: int, steps: int, rate: float = math.inf
    ) -> str:
        """Say what is wrong with an update whose names and dtypes are as expected, or return an empty string.

        Whole weights must not have moved further than so many steps at the round's learning rate can carry them.
        """
        from fedtune.lora.state import as_sent, to_tensors

        known = spaces.of(self.config).whole and rate < math.inf
        within = self.outer.reach(self.config.train, rate, steps) if known else None
        sent = as_sent(state.adapter, to_tensors(state.adapter))
        odd = sound.change_problem(update, sent, within) if within else ""
        return odd or self.outer.flaw(update, state, client, round_, steps)

    def middle(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> ServerState:
        """Return the state for the next exchange of the same round."""
        updates = self._taken(updates, replace(state, round=round_ - 1))
        return self.method.middle(updates, state, round_)

    def server_step(
        self,
        updates: Sequence[ClientUpdate],
        state: ServerState,
        round_: int,
        refused: int = 0,
        note: Note = unheard,
    ) -> ServerState:
        """Return the state after a round.

        Args:
            updates: not empty, and sorted by client.
            state: before it.
            round_: which.
            refused: how many more replies of the round were refused for what they hold.
            note: told what a robust rule did, for the round's record.

        Raises:
            UpdateError: a client's numbers cannot be aggregated; without it the others' can.
            RunFailedError: fewer updates than a robust rule needs.
        """
        # a method may draw what is frozen from the round's number, and rounds may have been skipped since the last step
        updates = self._taken(updates, replace(state, round=round_ - 1))
        return self.outer.server_step(updates, state, RoundContext(round_, refused, note))

    def _taken(self, updates: Sequence[ClientUpdate], state: ServerState) -> list[ClientUpdate]:
        """Return the updates as the state moved by each, looked at before anything is made of them.

        A sum was looked at term by term as it came.

        Raises:
            UpdateError: the first client whose numbers cannot be taken.
        """
        from fedtune.lora.state import received

        for update in () if self.streams else updates:
            problem = sound.number_problem(update.tensors)
            # where only means of factors are taken, the bounds on those are enough
            if not problem and self.method.comparable and self.method.pairs and not self.method.running:
                whole = self.method.completed(self.outer.plain(update), state)
                problem = sound.product_problem(whole, state.adapter)
            if problem:
                raise UpdateError(update.client, problem)
        return [replace(u, tensors=received(state.adapter, u.tensors)) for u in updates]
