"""What methods share whose server step is one function of a layer's adapters, whatever their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.methods.base import Method
from fedtune.methods.state import ClientUpdate, ServerState

if TYPE_CHECKING:
    from fedtune.lora.state import AdapterState, LoraModule


def template(clients: Sequence[AdapterState], rank: int = 0) -> AdapterState:
    """Return zeros in the shape of the largest client, or of a given rank."""
    from fedtune.lora.state import resized

    largest = {path: max((c[path] for c in clients), key=lambda m: m.rank) for path in clients[0]}
    return {path: resized(module, rank or module.rank) for path, module in largest.items()}


class ByLayer(Method):
    """A method that merges layer by layer."""

    cuts = True

    def merge(self, module: LoraModule, clients: Sequence[LoraModule], weights: Sequence[float]) -> LoraModule:
        """Return one layer's new factors, of the rank that `module`, the server's, has."""
        raise NotImplementedError

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> ServerState:
        """Merge every layer of the updates."""
        adapters = [self.completed(u, state) for u in updates]
        return self._merged(adapters, self.weights(updates), state, round_)

    def aggregate(
        self, clients: Sequence[AdapterState], examples: Sequence[float], state: ServerState, round_: int, rank: int = 0
    ) -> ServerState:
        """Aggregate adapters of any ranks; the result has the largest one unless told otherwise."""
        like = replace(state, adapter=template(clients, rank))
        return self._merged(clients, [float(n) for n in examples], like, round_)

    def _merged(
        self, adapters: Sequence[AdapterState], weights: Sequence[float], state: ServerState, round_: int
    ) -> ServerState:
        merged = {p: self.merge(m, [a[p] for a in adapters], weights) for p, m in state.adapter.items()}
        return replace(state, adapter=merged, round=round_)
