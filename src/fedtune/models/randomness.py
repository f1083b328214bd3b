"""Whether a model draws random numbers of its own while it trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.models.interface import plain_pass

# how much further apart two seeds are than one is from itself, where a device does not repeat a pass to the bit
FURTHER = 4


def is_random(base: Any, text: Sequence[int]) -> bool:
    """Tell whether what a model gives while it trains depends on random numbers: some drop, some route by chance."""
    drops = (
        value
        for module in base.modules()
        for name, value in vars(module).items()
        if "drop" in name and isinstance(value, float)
    )
    layers = (m for m in base.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    return any(p > 0 for p in drops) or any(m.p > 0 for m in layers) or _varies(base, text)


@torch.no_grad()
def _varies(base: Any, text: Sequence[int]) -> bool:
    """Tell whether a text's logits in training mode are further apart under two seeds than under one twice."""

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        found: Tensor = plain_pass(base, text).logits[0].double()
        return found.nan_to_num()

    base.train()
    try:
        first, same, other = logits(0), logits(0), logits(1)
    except Exception:  # whatever a model's own code raises, it is not trained so
        return False
    finally:
        base.eval()
    return bool((other - first).norm() > FURTHER * (same - first).norm())
