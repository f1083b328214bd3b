"""RBLA: rank by rank, the mean over the clients that have it (arXiv 2408.08699).

Row j of A and column j of B are averaged over the clients of rank j or more, with their weights among themselves: the
rows few clients have are not diluted by the others' zeros. A client of rank r_i downloads the first r_i. Not exact,
and tied to the gauge: row j of one client has to mean what row j of another does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.lazy import torch
from fedtune.lora.state import LoraModule, with_rank
from fedtune.methods.by_layer import ByLayer

if TYPE_CHECKING:
    from torch import Tensor


class RBLA(ByLayer):
    """Per-rank mean over the owners."""

    name = "rbla"
    title = "RBLA"
    paper = "arXiv:2408.08699"
    mixed_ranks = True

    def shares(self, clients: Sequence[LoraModule], weights: Sequence[float], rank: int) -> Tensor:
        """Return each client's weight for each rank [clients, rank]; 0 where it does not have it."""
        owned = torch.arange(rank)[None] < torch.tensor([m.rank for m in clients])[:, None]
        return owned * torch.tensor(weights, dtype=torch.float64)[:, None]

    def merge(self, module: LoraModule, clients: Sequence[LoraModule], weights: Sequence[float]) -> LoraModule:
        """Return one module's new factors; scales of other ranks or alphas are taken up by B."""
        table = self.shares(clients, weights, module.rank)
        total = table.sum(0)
        share = table / total.clamp(min=1e-300)
        padded = [with_rank(m, module.rank) for m in clients]
        factor = [m.scale / module.scale for m in padded]
        a = sum(s[:, None] * m.a for s, m in zip(share, padded, strict=True))
        b = sum(s * f * m.b for s, f, m in zip(share, factor, padded, strict=True))
        return _kept(module, {"a": a, "b": b}, total > 0)


def _kept(module: LoraModule, new: Mapping[str, Tensor], owned: Tensor) -> LoraModule:
    """Return the new factors where somebody owns the rank, the old ones elsewhere."""
    a = torch.where(owned[:, None], new["a"].to(module.a.dtype), module.a)
    return replace(module, a=a, b=torch.where(owned, new["b"].to(module.b.dtype), module.b))
