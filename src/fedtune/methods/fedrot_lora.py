"""FedRot-LoRA: each client rotates its factors towards the global ones before sending (arXiv 2602.23638).

(B R, R^T A) is the same model for any orthogonal R; the R nearest to the reference removes the part of FedIT's error
that is only a difference of gauge. Odd rounds align A, even rounds B; the first round has nothing to align to.
`blend` < 1 turns only part of the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from fedtune.lora.product import rotation_to
from fedtune.methods.base import Method
from fedtune.methods.fedit import FedIT
from fedtune.methods.requests import Tensors
from fedtune.names import A, B

if TYPE_CHECKING:
    from torch import Tensor


class FedRotLoRA(FedIT):
    """FedIT of rotated factors."""

    name = "fedrot_lora"
    title = "FedRot-LoRA"
    paper = "arXiv:2602.23638"
    spaces = Method.spaces

    class Parameters(FedIT.Parameters):
        """`blend`: how far to turn, from 0 (not at all) to 1 (onto the reference)."""

        blend: float = Field(1.0, ge=0, le=1)

        def inert(self) -> str:
            """A blend of 0 is FedIT under another name."""
            return "with blend = 0 this is FedIT" if self.blend == 0 else ""

    parameters: Parameters

    def payload(self, trained: Tensors, start: Tensors, round_: int) -> dict[str, Tensor]:
        """Rotate every module; the product of the factors is unchanged."""
        turned = dict(trained)
        if round_ > 1:
            for name in trained:
                if name.endswith(A):
                    path = name.removesuffix(A)
                    pair = self.rotate(trained[name], trained[path + B], start[name], start[path + B], round_)
                    turned[name], turned[path + B] = pair
        return turned

    def rotate(self, a: Tensor, b: Tensor, a_start: Tensor, b_start: Tensor, round_: int) -> tuple[Tensor, Tensor]:
        """Return (R^T A, B R) with R nearest to the reference of this round's factor."""
        blend = self.parameters.blend
        turn = rotation_to(a, a_start, blend) if round_ % 2 else rotation_to(b.T, b_start.T, blend)
        return (turn.T @ a.to(turn.dtype)).to(a.dtype), (b.to(turn.dtype) @ turn).to(b.dtype)
