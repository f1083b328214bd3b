"""FlexLoRA: the exact mean of the products, cut to the adapter's rank by SVD (arXiv 2402.11505).

M = sum_i w_i s_i B_i A_i is the ideal update; the new factors are B = U_r S_r / s and A = V_r^T. The cut is the best
possible (Eckart-Young); what it loses is not kept anywhere. M is never built: QR of the stacked factors and the SVD
of a small core give the same. Gauge-invariant: how a client splits its product does not matter. A client of rank r_i
downloads the first r_i components.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedtune.lora import product
from fedtune.lora.product import Product
from fedtune.lora.state import LoraModule
from fedtune.methods.base import DORA
from fedtune.methods.by_layer import ByLayer


class FlexLoRA(ByLayer):
    """Rank-r SVD of the mean product."""

    name = "flexlora"
    title = "FlexLoRA"
    paper = "arXiv:2402.11505"
    spaces = DORA
    mixed_ranks = True
    updates = "product"
    steady = False

    def merge(self, module: LoraModule, clients: Sequence[LoraModule], weights: Sequence[float]) -> LoraModule:
        """Return one module's new factors, of the rank that `module` has."""
        return self.factors_of(module, product.truncate(product.stack(clients, weights), module.rank))

    def factors_of(self, module: LoraModule, best: Product) -> LoraModule:
        """Return the best product as factors: the singular values on B."""
        return replace(module, b=(best.left / module.scale).to(module.b.dtype), a=best.right.to(module.a.dtype))
