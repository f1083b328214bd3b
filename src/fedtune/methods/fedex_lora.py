"""FedEx-LoRA: the mean factors as in FedIT, and what they miss of the ideal update into the base (arXiv 2410.09432).

The residual M - s mean(B) mean(A) = s sum_i w_i (B_i - mean B)(A_i - mean A) has rank at most (N - 1) r and is kept
in that many columns, in the orientation of B A, whatever way round the layer stores its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from fedtune.methods.base import Method
from fedtune.methods.base_delta import MovesBase
from fedtune.methods.state import ClientUpdate, ServerState, Sizes

if TYPE_CHECKING:
    from fedtune.lora.product import Product
    from fedtune.lora.state import AdapterState


class FedExLoRA(MovesBase):
    """FedIT plus its exact residual."""

    name = "fedex_lora"
    title = "FedEx-LoRA"
    paper = "arXiv:2410.09432"
    exact = True

    class Parameters(MovesBase.Parameters):
        """`residual_rank`: keep only the residual's best approximation of this rank; 0 keeps all of it."""

        residual_rank: int = Field(0, ge=0)

    parameters: Parameters

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """The adapter up; the mean and N - 1 blocks of the residual down."""
        whole = sizes.a + sizes.b
        return whole, whole * sizes.clients

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> ServerState:
        """Average the factors and append the residual."""
        adapters = [self.completed(u, state) for u in updates]
        residual = self._residual(adapters, self.weights(updates))
        mean = Method.server_step(self, updates, state, round_)
        return self.moved(state, mean.adapter, residual, updates, round_)

    def aggregate(
        self, clients: Sequence[AdapterState], examples: Sequence[float], state: ServerState, round_: int, rank: int = 0
    ) -> ServerState:
        """Average adapters of one rank; scales may differ."""
        from fedtune.lora.base_delta import append
        from fedtune.lora.state import rescaled, to_tensors

        fitting = [{path: rescaled(m, state.adapter[path]) for path, m in c.items()} for c in clients]
        updates = [ClientUpdate(i, to_tensors(c), n) for i, (c, n) in enumerate(zip(fitting, examples, strict=True))]
        mean = Method.server_step(self, updates, state, round_)
        return replace(mean, base=append((), round_, self._residual(fitting, list(examples))))

    def _residual(self, adapters: Sequence[AdapterState], weights: Sequence[float]) -> dict[str, Product]:
        from fedtune.lora import product

        limit = self.parameters.residual_rank
        whole = {path: product.residual([a[path] for a in adapters], weights) for path in adapters[0]}
        return {p: product.truncate(r, limit) if 0 < limit < r.inner else r for p, r in whole.items()}
