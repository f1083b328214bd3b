"""FedSA-LoRA: both factors are trained, A is averaged, B never leaves its client (arXiv 2410.01463).

There is no single global model: client i's is (mean A, B_i), and only that is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors, Train
from fedtune.methods.state import ServerState, Sizes
from fedtune.names import A

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.lora.state import AdapterState


class FedSALoRA(Method):
    """Mean of A; B stays at home."""

    name = "fedsa_lora"
    title = "FedSA-LoRA"
    paper = "arXiv:2410.01463"
    personalised = True
    global_adapter = False
    private = True
    pairs = False
    comparable = False
    running = True

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """A both ways."""
        return sizes.a, sizes.a

    @staticmethod
    def _shared(name: str) -> bool:
        return A in name

    def begin(self, layout: AdapterState, download: Tensors, kept: Tensors, round_: int) -> dict[str, Tensor]:
        """Start from the mean A and this client's own B."""
        return {**super().begin(layout, download, {}, round_), **kept}

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Train both; send A, keep B."""
        trained = yield Train(start, list(start), lambda now: self.loss_term(now, start))
        kept = {n: t for n, t in trained.items() if not self._shared(n)}
        return Fitted(self.payload(trained, start, client.round), kept)

    def payload(self, tensors: Tensors, start: Tensors, round_: int) -> dict[str, Tensor]:
        """Send A."""
        return {n: t for n, t in tensors.items() if self._shared(n)}

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send A."""
        return {n: t for n, t in super().view(state, client).items() if self._shared(n)}

    def expected(self, state: ServerState, client: int, round_: int) -> dict[str, Tensor]:
        """Expect A."""
        return {n: t for n, t in super().expected(state, client, round_).items() if self._shared(n)}

    def aggregate(
        self, clients: Sequence[AdapterState], examples: Sequence[float], state: ServerState, round_: int, rank: int = 0
    ) -> ServerState:
        """Average A; the server has no B, and nobody's stands in for it."""
        after = super().aggregate(clients, examples, state, round_, rank)
        return replace(after, adapter={path: replace(m, b=m.b * 0) for path, m in after.adapter.items()})

    def personal(
        self, clients: Sequence[AdapterState], examples: Sequence[float], after: ServerState
    ) -> Iterator[AdapterState]:
        """Return the mean A with each client's own B."""
        return ({path: replace(m, a=after.adapter[path].a) for path, m in client.items()} for client in clients)
