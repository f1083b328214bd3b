"""FedSA-LoRA: both factors are trained, A is averaged, B never leaves its client (arXiv 2410.01463).

There is no single global model: client i's is (mean A, B_i), and only that is evaluated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Fitted, Program, Tensors, Train
from fedtune.methods.state import ServerState, Sizes, Upload
from fedtune.names import A

if TYPE_CHECKING:
    from torch import Tensor


def shared(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors that are averaged."""
    return {n: t for n, t in tensors.items() if A in n}


class FedSALoRA(Method):
    """Mean of A; B stays at home."""

    name = "fedsa_lora"
    title = "FedSA-LoRA"
    paper = "arXiv:2410.01463"
    models = "own"
    updates = "opaque"

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """A both ways."""
        return sizes.a, sizes.a

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Start from the mean A and this client's own B."""
        return {**super().begin(client, download), **client.kept}

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Train both; send A, keep B."""
        trained = yield Train(start, list(start))
        sent = self.payload(trained, start, client.round)
        return Fitted(sent, {n: t for n, t in trained.items() if n not in sent})

    def payload(self, trained: Tensors, start: Tensors, round_: int) -> dict[str, Tensor]:
        """Send A."""
        return shared(trained)

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send A."""
        return shared(super().view(state, client))

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Expect A."""
        whole = super().upload(state, client, round_, steps)
        return replace(whole, tensors=shared(whole.tensors))
