"""FLoRIST: the mean product cut at the rank that holds a share of its energy (arXiv 2506.09199).

The server chooses each layer's rank: the fewest singular values whose squares sum to `tau` of all, at most the
adapter's. Components beyond it keep their direction in A and have B = 0, so they can be trained again.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from fedtune.lora import product
from fedtune.lora.state import LoraModule
from fedtune.methods.flexlora import FlexLoRA


class FLoRIST(FlexLoRA):
    """SVD of the mean product, rank by energy."""

    name = "florist"
    title = "FLoRIST"
    paper = "arXiv:2506.09199"

    class Parameters(FlexLoRA.Parameters):
        """`tau`: the share of the energy (sum of squared singular values) to keep."""

        tau: float = Field(0.99, gt=0, le=1)

        def inert(self) -> str:
            """With all of the energy it is FlexLoRA."""
            return "with tau = 1 this is FlexLoRA" if self.tau == 1 else ""

    parameters: Parameters

    def merge(self, module: LoraModule, clients: Sequence[LoraModule], weights: Sequence[float]) -> LoraModule:
        """Return one module's new factors; what lies beyond the energy's rank is zero in B."""
        tau = self.parameters.tau
        whole = product.stack(clients, weights)
        best = product.truncate(whole, module.rank)
        rank = product.energy_rank(best.left.norm(dim=0), tau * product.norm(whole) ** 2)
        best.left[:, rank:] = 0
        return self.factors_of(module, best)
