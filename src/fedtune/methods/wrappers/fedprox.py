"""FedProx: a term in each step's loss that pulls a client's parameters towards the global ones (arXiv 1812.06127)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Program, Request, Tensors, Term, Train, handled
from fedtune.methods.wrappers.base import Wrapper

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.config import Config


def proximal(now: Tensors, start: Tensors, mu: float) -> Tensor:
    """Return mu/2 ||x - x_global||^2; its gradient is mu (x - x_global) (equation 2)."""
    squares = [(now[name] - start[name].to(now[name].device)).square().sum() for name in now]
    return mu / 2 * sum(squares[1:], squares[0])


class FedProx(Wrapper):
    """Adds the proximal term to what a method trains."""

    name = "fedprox"

    @classmethod
    def asked(cls, config: Config, kind: type[Method]) -> bool:
        """With `drift.proximal_mu`."""
        return bool(config.drift.proximal_mu)

    def _nearer(self, start: Tensors, term: Term | None) -> Term:
        def both(now: Tensors) -> Tensor:
            own = term(now) if term else None
            pull = proximal(now, start, self.config.drift.proximal_mu)
            return pull if own is None else own + pull

        return both

    def _handle(self, request: Request) -> Program[Any]:
        if isinstance(request, Train):
            request = replace(request, term=self._nearer(request.start, request.term))
        return (yield request)

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Pull every step towards the start."""
        return handled(self.inner.fit(client, start), self._handle)
