"""LoRA-FAIR: the mean of the factors, with B corrected towards the ideal product (arXiv 2411.14961).

B = mean(B) + D, where D minimises ||M/s - (mean(B) + D) mean(A)||^2 + lambda ||D||^2. The paper descends on a cosine
distance; this is its ridge form, which has the closed solution D = (M/s - mean(B) mean(A)) mean(A)^T (mean(A)
mean(A)^T + lambda I)^-1. lambda -> infinity is FedIT, lambda -> 0 projects the ideal update on the row space of
mean(A).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pydantic import Field

from fedtune.lora.product import ridge_factors
from fedtune.lora.state import LoraModule
from fedtune.methods.base import DORA, Method
from fedtune.methods.by_layer import ByLayer


class LoRAFAIR(ByLayer):
    """FedIT with a ridge correction of B."""

    name = "lora_fair"
    title = "LoRA-FAIR (ridge form)"
    paper = "arXiv:2411.14961"
    spaces = DORA

    class Parameters(Method.Parameters):
        """`ridge`: the lambda of the correction; larger stays nearer to FedIT."""

        ridge: float = Field(0.01, gt=0)

    parameters: Parameters

    def merge(self, module: LoraModule, clients: Sequence[LoraModule], weights: Sequence[float]) -> LoraModule:
        """Return the mean factors with B corrected."""
        ridge = self.parameters.ridge
        a, b = ridge_factors(clients, weights, ridge)
        return replace(module, a=a.to(module.a.dtype), b=b.to(module.b.dtype))
