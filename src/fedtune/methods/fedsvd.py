"""FedSVD: only B is trained; after each round A is given orthonormal rows by an SVD (arXiv 2505.12805).

mean(B) A is exact; its SVD U S V^T gives A = V^T and B = U S, the same product in a better-conditioned gauge. Clients
start each round with a fresh optimiser, so no optimiser state refers to the old gauge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fedtune.lora.product import of, truncate
from fedtune.lora.state import LoraModule
from fedtune.methods.base import DORA, Method
from fedtune.methods.state import ClientUpdate, RoundContext, ServerState, Sizes
from fedtune.names import A


class FedSVD(Method):
    """Mean of B, then an SVD of the product."""

    name = "fedsvd"
    title = "FedSVD"
    paper = "arXiv:2505.12805"
    guarantee = "exact"
    spaces = DORA
    updates = "product"
    steady = False
    linear = True

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """B up, both factors down."""
        return sizes.b, sizes.a + sizes.b

    def trainable(self, round_: int, name: str) -> bool:
        """Train B only; A changes on the server."""
        return A not in name

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, context: RoundContext) -> ServerState:
        """Average B, then re-orthogonalise every module."""
        merged = super().server_step(updates, state, context)
        return replace(merged, adapter={path: self.orthogonalise(m) for path, m in merged.adapter.items()})

    def orthogonalise(self, module: LoraModule) -> LoraModule:
        """Return the same product with orthonormal rows of A; an all-zero product keeps its factors.

        A layer narrower than the rank has fewer such rows than A: the others are 0, in B as well.
        """
        if not module.b.any():
            return module
        whole = truncate(of(module), module.rank)
        return replace(module, b=(whole.left / module.scale).to(module.b.dtype), a=whole.right.to(module.a.dtype))
