"""FediLoRA: RBLA's mean over the owners of each rank, and a repair of the weakest layer (arXiv 2509.06984).

After its local training a client finds the layer whose update agrees least with the global one (smallest cosine of
the two products) and moves it towards that by `repair`. Our reading: the paper has no public code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from fedtune.methods.rbla import RBLA
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors
from fedtune.names import A, B

if TYPE_CHECKING:
    from torch import Tensor


def agreement(a: Tensor, b: Tensor, a_start: Tensor, b_start: Tensor) -> float:
    """Return the cosine of B A and B_start A_start through r x r products; 1 where either is zero."""
    a, b, a_start, b_start = (t.double() for t in (a, b, a_start, b_start))
    cross = ((b_start.T @ b) * (a_start @ a.T)).sum()
    sizes = ((b.T @ b) * (a @ a.T)).sum() * ((b_start.T @ b_start) * (a_start @ a_start.T)).sum()
    return float(cross / sizes.sqrt()) if float(sizes) > 0 else 1.0


class FediLoRA(RBLA):
    """RBLA with a repaired layer."""

    name = "fedilora"
    title = "FediLoRA"
    paper = "arXiv:2509.06984"

    class Parameters(RBLA.Parameters):
        """`repair`: how far the weakest layer is moved to the global one; 0 is RBLA."""

        repair: float = Field(0.5, ge=0, le=1)

        def inert(self) -> str:
            """Without repair it is RBLA."""
            return "with repair = 0 this is RBLA" if self.repair == 0 else ""

    parameters: Parameters

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Train, and repair the weakest layer."""
        fitted = yield from super().fit(client, start)
        return replace(fitted, payload=self.repaired(fitted.payload, start))

    def repaired(self, trained: Tensors, start: Tensors) -> dict[str, Tensor]:
        """Return trained factors with the layer that agrees least moved towards the global one."""
        sent = dict(trained)
        paths = [n.removesuffix(A) for n in trained if n.endswith(A)]
        known = {p: agreement(*(t[p + e] for t in (trained, start) for e in (A, B))) for p in paths}
        weakest = min(paths, key=lambda p: known[p])
        if known[weakest] < 1:
            share = self.parameters.repair
            for name in (weakest + A, weakest + B):
                sent[name] = trained[name].lerp(start[name].to(trained[name].dtype), share)
        return sent
