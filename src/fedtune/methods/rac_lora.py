"""RAC-LoRA, federated: each round a fresh random A, B is trained, the product goes into the base (arXiv 2410.08305).

A is frozen and common, so mean(B) A is exact; drawing it anew each round lets the sum leave any one subspace. A is
made from the run's seed and never sent; what a client downloads is the last round's mean B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.lora import product
from fedtune.lora.state import AdapterState, fresh, to_tensors, with_tensors
from fedtune.methods.moves_base import MovesBase
from fedtune.methods.requests import ClientContext, Tensors
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Sizes, Upload, mean
from fedtune.names import A

if TYPE_CHECKING:
    from torch import Tensor


class RACLoRA(MovesBase):
    """FFA-LoRA with a fresh A each round, merged into the base."""

    name = "rac_lora"
    title = "RAC-LoRA"
    paper = "arXiv:2410.08305"
    guarantee = "exact"
    updates = "product"

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """B up, the last product down."""
        return sizes.b, sizes.a + sizes.b

    def trainable(self, round_: int, name: str) -> bool:
        """Train B only."""
        return A not in name

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Start from this round's A, and B = 0."""
        layout = fresh(client.layout, self.seed, client.round)
        return super().begin(replace(client, layout=layout), download)

    def shared(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send no adapter: each round's is fresh."""
        return {}

    def _used(self, state: ServerState, round_: int) -> AdapterState:
        """Return the adapter that clients start a round from; without a run, A is what all adapters have in common."""
        return fresh(state.adapter, self.seed, round_) if self.in_run else state.adapter

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Complete an update by the round's own A."""
        used = self._used(state, round_)
        whole = super().upload(state, client, round_, steps)
        return replace(whole, whole=lambda tensors: with_tensors(used, {**to_tensors(used), **tensors}))

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Move mean(B) A into the base model."""
        used = self._used(state, context.round)
        averaged = with_tensors(used, {**to_tensors(used), **mean(updates)})
        products = {path: product.of(module) for path, module in averaged.items()}
        return self.moved(state, fresh(used, self.seed, context.round + 1), products, updates, context.round)
