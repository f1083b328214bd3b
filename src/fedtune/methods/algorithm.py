"""A method inside its wrappers: what the round loop and the clients really call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune import spaces
from fedtune.config import Config
from fedtune.lora.state import AdapterState, as_kept, as_sent, received, to_tensors
from fedtune.methods import sound
from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Upload
from fedtune.methods.traits import comparable
from fedtune.methods.wrappers import Wrapper, asked, wrapped
from fedtune.names import A, B
from fedtune.types import UpdateError

if TYPE_CHECKING:
    from torch import Tensor


def _in_pairs(tensors: Tensors) -> bool:
    """Tell whether both factors of a layer are among tensors, so that only their product is bounded by neither."""
    return any(name.endswith(A) and name.removesuffix(A) + B in tensors for name in tensors)


class Algorithm(Wrapper):
    """A method and the wrappers that a run's settings ask for; it looks at every update before anything is made of it.

    Where updates are added up, each was looked at as it came.
    """

    name = ""

    def __init__(self, method: Method, config: Config) -> None:
        super().__init__(wrapped(method, config), config)
        self._names = {wrapper.name for wrapper in asked(config, type(method))}

    def initial(self, adapter: AdapterState) -> ServerState:
        """Return the server's state before the first round."""
        return self.inner.initial(as_kept(adapter))

    def work(self, client: ClientContext, download: Tensors) -> Program[Fitted]:
        """Do a client's work of one exchange from what it downloaded; in later ones it starts from just that."""
        return self.fit(client, download if client.phase > 1 else self.begin(client, download))

    def loadable(self, tensors: Tensors) -> Program[dict[str, Tensor]]:
        """Return tensors of a model as PEFT has them, without what wrappers put beside them."""
        return self.inner.loadable({n: t for n, t in tensors.items() if n.partition("/")[0] not in self._names})

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Return what a client downloads."""
        return as_sent(state.adapter, self.inner.view(state, client))

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0, rate: float = math.inf) -> Upload:
        """Return what a client has to send in a round of so many optimiser steps at a learning rate.

        Whole weights must not have moved further than such steps can carry them.
        """
        inner = self.inner.upload(state, client, round_, steps)
        known = inner.reach if spaces.of(self.config).whole and rate < math.inf else None
        within = known(self.config.train, rate) if known else None

        def problem(sent: Tensors) -> str:
            start = as_sent(state.adapter, to_tensors(state.adapter)) if within else {}
            moved = sound.change_problem(sent, start, within) if within else ""
            return moved or inner.problem(sent)

        return replace(inner, tensors=as_sent(state.adapter, inner.tensors), problem=problem)

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Return the state after an exchange.

        Args:
            updates: not empty, and sorted by client.
            state: before it.
            context: the round.

        Raises:
            UpdateError: a client's numbers cannot be aggregated; without it the others' can.
            RunFailedError: fewer updates than a robust rule needs.
        """
        for update in () if self.linear else updates:
            if problem := self._problem(update, state, context.round):
                raise UpdateError(update.client, problem)
        taken = [replace(u, tensors=received(state.adapter, u.tensors)) for u in updates]
        return self.inner.server_step(taken, state, context)

    def _problem(self, update: ClientUpdate, state: ServerState, round_: int) -> str:
        problem = sound.number_problem(update.tensors)
        # where only means of factors are taken, the bounds on those are enough
        if problem or self.method.linear or not comparable(type(self.method)) or not _in_pairs(update.tensors):
            return problem
        upload = self.upload(state, update.client, round_)
        return sound.product_problem(upload.whole(update.tensors), state.adapter, upload.product)
