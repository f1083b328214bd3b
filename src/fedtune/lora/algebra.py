"""Pure algebra over adapter states. Accumulates in float32 or better, whatever comes in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor


def weighted_mean(states: Iterable[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return sum_i w_i x_i / sum_i w_i, tensor by tensor, in the dtype of the first state.

    A running sum: the memory needed does not grow with the number of states. The sum is over exact
    products in the order given; callers that want independence from arrival order sort first.

    Raises:
        ValueError: no states, or weights that do not sum to something above 0.
    """
    total = float(sum(weights))
    if not total > 0:
        raise ValueError(f"weights sum to {total}, not to something above 0")
    sums: dict[str, Tensor] = {}
    kinds: dict[str, torch.dtype] = {}
    for state, weight in zip(states, weights, strict=True):
        for name, tensor in state.items():
            if name not in sums:
                kinds[name] = tensor.dtype
                wide = torch.promote_types(tensor.dtype, torch.float32)
                sums[name] = torch.zeros_like(tensor, dtype=wide)
            sums[name].add_(tensor.to(sums[name].dtype), alpha=weight / total)
    return {name: value.to(kinds[name]) for name, value in sums.items()}
