"""What methods share whose server step is one function of a layer's adapters, whatever their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedtune.lora.state import LoraModule
from fedtune.methods.base import Method
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, weights


class ByLayer(Method):
    """A method that merges layer by layer."""

    def merge(self, module: LoraModule, clients: Sequence[LoraModule], weights: Sequence[float]) -> LoraModule:
        """Return one layer's new factors, of the rank that `module`, the server's, has."""
        raise NotImplementedError

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Merge every layer of the updates."""
        adapters, shares = self.adapters(updates, state, context.round), weights(updates)
        merged = {p: self.merge(m, [a[p] for a in adapters], shares) for p, m in state.adapter.items()}
        return replace(state, adapter=merged, round=context.round)
