"""FedEx-LoRA: the mean factors as in FedIT, and what they miss of the ideal update into the base (arXiv 2410.09432).

The residual M - s mean(B) mean(A) = s sum_i w_i (B_i - mean B)(A_i - mean A) has rank at most (N - 1) r and is kept
in that many columns, in the orientation of B A, whatever way round the layer stores its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from fedtune.lora import product
from fedtune.methods.moves_base import MovesBase
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Sizes, weights

if TYPE_CHECKING:
    from fedtune.config import Config


class FedExLoRA(MovesBase):
    """FedIT plus its exact residual."""

    name = "fedex_lora"
    title = "FedEx-LoRA"
    paper = "arXiv:2410.09432"
    guarantee = "exact"

    class Parameters(MovesBase.Parameters):
        """`residual_rank`: keep only the residual's best approximation of this rank; 0 keeps all of it."""

        residual_rank: int = Field(0, ge=0)

        def idle(self, config: Config) -> Iterator[tuple[str, str]]:
            """Name a limit that no residual reaches as well."""
            yield from super().idle(config)
            most = max((config.federation.cohort_size - 1) * config.lora.r, 1)
            if self.residual_rank >= most:
                yield "method.residual_rank", f"the residual of a round has a rank of at most {most}"

    parameters: Parameters

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """The adapter up; the mean and N - 1 blocks of the residual down."""
        whole = sizes.a + sizes.b
        return whole, whole * sizes.clients

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Average the factors and append the residual."""
        adapters, limit = self.adapters(updates, state, context.round), self.parameters.residual_rank
        whole = {path: product.residual([a[path] for a in adapters], weights(updates)) for path in adapters[0]}
        residual = {p: product.truncate(r, limit) if 0 < limit < r.inner else r for p, r in whole.items()}
        averaged = super().server_step(updates, state, context)
        return self.moved(state, averaged.adapter, residual, updates, context.round)
