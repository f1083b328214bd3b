"""FedMomentum: the rank-r SVD of the ideal update is the next adapter, the rest goes into the base (arXiv 2603.08014).

FlexLoRA's factors with FedEx-LoRA's exactness: SVD_r(M) + (M - SVD_r(M)) = M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedtune.lora import product
from fedtune.methods.moves_base import MovesBase
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Sizes, weights


class FedMomentum(MovesBase):
    """SVD to the adapter, remainder to the base."""

    name = "fedmomentum"
    title = "FedMomentum"
    paper = "arXiv:2603.08014"
    guarantee = "exact"
    mixed_ranks = True
    updates = "product"

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """The adapter up; SVD_r and the other N - 1 blocks down."""
        whole = sizes.a + sizes.b
        return whole, whole * sizes.clients

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Split the mean product."""
        adapters, made, rest = self.adapters(updates, state, context.round), {}, {}
        for path, module in state.adapter.items():
            whole = product.stack([a[path] for a in adapters], weights(updates))
            best, rest[path] = product.split(whole, module.rank)
            b, a = (best.left / module.scale).to(module.b.dtype), best.right.to(module.a.dtype)
            made[path] = replace(module, b=b, a=a)
        return self.moved(state, made, rest, updates, context.round)
