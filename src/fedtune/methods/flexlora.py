"""FlexLoRA: the exact mean of the products, cut to the adapter's rank by SVD (arXiv 2402.11505).

M = sum_i w_i s_i B_i A_i is the ideal update; the new factors are B = U_r S_r / s and A = V_r^T. The cut is the best
possible (Eckart-Young); what it loses is not kept anywhere. M is never built: QR of the stacked factors and the SVD
of a small core give the same. Gauge-invariant: how a client splits its product does not matter. A client of rank r_i
downloads the first r_i components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.methods.base import ClientUpdate, Method, ServerState

if TYPE_CHECKING:
    from fedtune.lora.product import Product
    from fedtune.lora.state import AdapterState, LoraModule


def template(clients: Sequence[AdapterState], rank: int) -> AdapterState:
    """Return zeros in the shape of the largest client, or of a given rank."""
    from fedtune.lora.state import resized

    largest = {path: max((c[path] for c in clients), key=lambda m: m.rank) for path in clients[0]}
    return {path: resized(module, rank or module.rank) for path, module in largest.items()}


class FlexLoRA(Method):
    """Rank-r SVD of the mean product."""

    name = "flexlora"
    title = "FlexLoRA"
    paper = "arXiv:2402.11505"
    linear = False
    mixed_ranks = True
    factors = False
    dora = "exact"

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> ServerState:
        """Replace each module by the best rank-r factors of the mean product."""
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
        merged: AdapterState = {
            path: self.merge(module, [a[path] for a in adapters], weights) for path, module in state.adapter.items()
        }
        return replace(state, adapter=merged, round=round_)

    def merge(self, module: LoraModule, clients: Sequence[LoraModule], weights: Sequence[float]) -> LoraModule:
        """Return one module's new factors, of the rank that `module` has."""
        from fedtune.lora import product

        return self.factors_of(module, product.truncate(product.stack(clients, weights), module.rank))

    def factors_of(self, module: LoraModule, best: Product) -> LoraModule:
        """Return the best product as factors: the singular values on B."""
        return replace(module, b=(best.left / module.scale).to(module.b.dtype), a=best.right.to(module.a.dtype))
