"""FLoRA: the clients' factors are stacked, without any error, and moved into the base model (arXiv 2409.05976).

M = sum_i w_i s_i B_i A_i is the stack [B_1 ... B_N] [w_1 s_1 A_1; ...]: each client's own scale, the weight on one
factor only. Every round starts from a fresh random A, the same on every client from the run's seed, and B = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.lora import product
from fedtune.lora.state import fresh
from fedtune.methods.moves_base import MovesBase
from fedtune.methods.requests import ClientContext, Tensors
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Sizes, weights

if TYPE_CHECKING:
    from torch import Tensor


class FLoRA(MovesBase):
    """Stacking; clients start each round from a fresh adapter."""

    name = "flora"
    title = "FLoRA (stacking)"
    paper = "arXiv:2409.05976"
    guarantee = "exact"
    mixed_ranks = True
    updates = "product"

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """The adapter up, the whole stack down."""
        return sizes.a + sizes.b, sizes.clients * (sizes.a + sizes.b)

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Start from this round's fresh adapter."""
        layout = fresh(client.layout, self.seed, client.round)
        return super().begin(replace(client, layout=layout), download)

    def shared(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send no adapter: each round's is fresh."""
        return {}

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Move the stack into the base model."""
        adapters, shares = self.adapters(updates, state, context.round), weights(updates)
        stacks = {path: product.stack([a[path] for a in adapters], shares) for path in adapters[0]}
        return self.moved(state, fresh(state.adapter, self.seed, context.round + 1), stacks, updates, context.round)
