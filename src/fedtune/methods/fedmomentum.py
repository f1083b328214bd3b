"""FedMomentum: the rank-r SVD of the ideal update is the next adapter, the rest goes into the base (arXiv 2603.08014).

FlexLoRA's factors with FedEx-LoRA's exactness: SVD_r(M) + (M - SVD_r(M)) = M.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.methods.base_delta import MovesBase
from fedtune.methods.state import ClientUpdate, ServerState, Sizes

if TYPE_CHECKING:
    from fedtune.lora.product import Product
    from fedtune.lora.state import AdapterState


class FedMomentum(MovesBase):
    """SVD to the adapter, remainder to the base."""

    name = "fedmomentum"
    title = "FedMomentum"
    paper = "arXiv:2603.08014"
    exact = True
    mixed_ranks = True
    by_product = True

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """The adapter up; SVD_r and the other N - 1 blocks down."""
        whole = sizes.a + sizes.b
        return whole, whole * sizes.clients

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> ServerState:
        """Split the mean product."""
        adapters = [self.completed(u, state) for u in updates]
        adapter, rest = self._split(adapters, self.weights(updates), state.adapter)
        return self.moved(state, adapter, rest, updates, round_)

    def aggregate(
        self, clients: Sequence[AdapterState], examples: Sequence[float], state: ServerState, round_: int, rank: int = 0
    ) -> ServerState:
        """Aggregate adapters of any ranks and scales; the adapter has the largest rank."""
        from fedtune.lora.base_delta import append
        from fedtune.methods.by_layer import template

        adapter, rest = self._split(clients, list(examples), template(clients))
        return replace(state, adapter=adapter, round=round_, base=append((), round_, rest))

    def _split(
        self, adapters: Sequence[AdapterState], weights: Sequence[float], like: AdapterState
    ) -> tuple[AdapterState, dict[str, Product]]:
        from fedtune.lora import product

        made, rest = {}, {}
        for path, module in like.items():
            best, rest[path] = product.split(product.stack([a[path] for a in adapters], weights), module.rank)
            made[path] = replace(
                module, b=(best.left / module.scale).to(module.b.dtype), a=best.right.to(module.a.dtype)
            )
        return made, rest
