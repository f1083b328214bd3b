"""Layers of a loaded base model in a form that passes over memory fewer times, with the same result.

A layer is only replaced where the new form gives the old one's output on a trial input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5


class _Normalise(torch.autograd.Function):
    """x / rms(x) * weight, in float32 inside, with the gradient of x only: the weight is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        scale = (torch.linalg.vecdot(wide, wide) / x.shape[-1] + eps).rsqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, scale)
        normalised: Tensor = (wide * scale).to(x.dtype).mul_(weight)
        return normalised

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        wide = x.to(scale.dtype)
        weighted = (grad * weight).to(scale.dtype)
        inner = torch.linalg.vecdot(weighted, wide).unsqueeze(-1).mul_(scale.pow(3)).div_(-x.shape[-1])
        return weighted.mul_(scale).addcmul_(wide, inner).to(x.dtype), None, None


class FusedRMSNorm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019) of a frozen model: two passes forward and three backward."""

    def __init__(self, weight: nn.Parameter, eps: float, own: nn.Module) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        # a list, so that the model does not count its weight twice
        self._own = [own]

    @property
    def own(self) -> nn.Module:
        """The layer that this one stands for."""
        return self._own[0]

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input, of any shape [..., hidden]."""
        normalised: Tensor = _Normalise.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normalised


def _fused(module: nn.Module) -> FusedRMSNorm | None:
    """Return the fused form of a norm, if it is one that this form reproduces."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or eps is None:
        return None
    if weight.device.type == "meta" or type(module) is FusedRMSNorm:
        return None
    fused = FusedRMSNorm(weight, float(eps), module)
    generator = torch.Generator().manual_seed(0)
    trial = torch.randn(2, weight.numel(), generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        same = torch.allclose(fused(trial).float(), module(trial).float(), rtol=TOLERANCE, atol=TOLERANCE)
    return fused if same else None


def fuse(model: nn.Module) -> int:
    """Replace what can be replaced in a frozen model; return how many layers were."""
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            fused = _fused(child)
            if fused is not None:
                setattr(parent, name, fused.train(child.training))
                replaced += 1
    return replaced


def restore(model: nn.Module) -> int:
    """Put a model's own layers back; return how many were."""
    replaced = [(p, n, c) for p in model.modules() for n, c in p.named_children() if isinstance(c, FusedRMSNorm)]
    for parent, name, child in replaced:
        setattr(parent, name, child.own.train(child.training))
    return len(replaced)
