"""FedProx: a proximal term keeps each client near what it downloaded (arXiv 1812.06127, equation 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from pydantic import Field

from fedtune.config.schema import Section
from fedtune.methods.fedit import FedIT

if TYPE_CHECKING:
    from torch import Tensor


class FedProx(FedIT):
    """FedIT with mu/2 ||x - x_global||^2 added to every client's loss."""

    name = "fedprox"
    title = "FedProx"
    paper = "arXiv:1812.06127"

    class Parameters(Section):
        """`mu`: strength of the proximal term."""

        mu: float = Field(0.01, ge=0)

    @property
    def mu(self) -> float:
        """The strength of the proximal term."""
        return cast("FedProx.Parameters", self.parameters).mu

    @classmethod
    def inert(cls, parameters: Section) -> str:
        """Mu = 0 is FedIT under another name."""
        return "with mu = 0 this is FedIT" if cast("FedProx.Parameters", parameters).mu == 0 else ""

    def loss_term(self, now: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor | None:
        """Return mu/2 times the squared distance; its gradient is mu (x - x_global)."""
        squares = [(now[name] - start[name].to(now[name].device)).square().sum() for name in now]
        return self.mu / 2 * sum(squares[1:], squares[0])
