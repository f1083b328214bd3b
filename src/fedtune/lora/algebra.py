"""Pure algebra over adapter states. Accumulates in float64, whatever comes in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from fedtune.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gram(changes: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return the inner products [n, n] of n sets of tensors, summed over their names, in float64."""
    table = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    for name in changes[0]:
        rows = torch.stack([change[name].double().flatten() for change in changes])
        table += rows @ rows.T
    return table


class RunningMean:
    """A weighted mean that takes one state after the other, in memory that does not grow with their number.

    Sums are kept in float64: a product of a float32 number and a count of examples is exact in it, so the order of
    the states hardly ever changes a bit of the mean.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self.weight = 0.0

    def add(self, state: Mapping[str, Tensor], weight: float) -> None:
        """Take a state with its weight."""
        for name, tensor in state.items():
            if name not in self._sums:
                self._dtypes[name] = tensor.dtype
                self._sums[name] = torch.zeros_like(tensor, dtype=torch.float64)
            self._sums[name].add_(tensor, alpha=weight)
        self.weight += weight

    def mean(self) -> dict[str, Tensor]:
        """Return the mean so far, each tensor in the dtype of the first state's.

        Raises:
            ValueError: no states, or weights that do not sum to something above 0.
        """
        if not self.weight > 0:
            raise ValueError(f"weights sum to {self.weight}, not to something above 0")
        return {name: (total / self.weight).to(self._dtypes[name]) for name, total in self._sums.items()}


def weighted_mean(states: Iterable[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return sum_i w_i x_i / sum_i w_i, each tensor in the dtype of the first state's; raises as `RunningMean.mean`."""
    sums = RunningMean()
    for state, weight in zip(states, weights, strict=True):
        sums.add(state, float(weight))
    return sums.mean()
