"""HLoRA: FlexLoRA's mean product and SVD with the singular values shared evenly by both factors (arXiv 2503.00813).

B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T: the same model, but both factors have the same norm, so one learning
rate suits both. Each client's own alpha/r is in M.
"""

from __future__ import annotations

from dataclasses import replace

from fedtune.lazy import torch
from fedtune.lora.product import Product
from fedtune.lora.state import LoraModule
from fedtune.methods.flexlora import FlexLoRA


class HLoRA(FlexLoRA):
    """Rank-r SVD of the mean product, balanced factors."""

    name = "hlora"
    title = "HLoRA"
    paper = "arXiv:2503.00813"

    def factors_of(self, module: LoraModule, best: Product) -> LoraModule:
        """Return the best product as factors of equal norms."""
        values = best.left.norm(dim=0)
        root = (values / module.scale).sqrt()
        direction = best.left / values.clamp(min=torch.finfo(values.dtype).tiny)  # zero columns stay zero
        return replace(
            module, b=(direction * root).to(module.b.dtype), a=(best.right * root[:, None]).to(module.a.dtype)
        )
