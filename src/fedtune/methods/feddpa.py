"""FedDPA-T: a global adapter that is averaged and a local one that stays, mixed for each text (arXiv 2403.19211).

Each round the global adapter is trained alone and sent; then the local one is trained beside the frozen global one,
each with weight 1/2. For a text the local adapter weighs half its mean cosine similarity (of the base model's last
hidden state) to five training examples of the client, the global one the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from fedtune.lazy import torch
from fedtune.lora.state import to_tensors
from fedtune.methods.base import Method
from fedtune.methods.requests import ClientContext, Features, Fitted, Program, Tensors, Train
from fedtune.methods.state import ServerState, Upload
from fedtune.names import ANCHORS, MIX, OTHER, beside

if TYPE_CHECKING:
    from torch import Tensor


class FedDPA(Method):
    """Global and local adapter."""

    name = "feddpa"
    title = "FedDPA-T"
    paper = "arXiv:2403.19211"
    models = "both"
    steady = False

    class Parameters(Method.Parameters):
        """`samples`: training examples a text is compared with; `local_weight`: factor of their similarity."""

        samples: int = Field(5, ge=1)
        local_weight: float = Field(0.5, gt=0, le=1)

    parameters: Parameters

    def begin(self, client: ClientContext, download: Tensors) -> dict[str, Tensor]:
        """Return the global adapter and, once there is one, the local."""
        start = {**super().begin(client, download), **client.kept}
        return {**start, MIX: torch.tensor(self.parameters.local_weight)} if client.kept else start

    def fit(self, client: ClientContext, start: Tensors) -> Program[Fitted]:
        """Train the global adapter, then the local one; send the first, keep the second."""
        shared = {n: start[n] for n in to_tensors(client.layout)}
        sent = yield Train(shared, list(shared))
        own = {n: t for n, t in start.items() if n.endswith(OTHER)}
        own = own or {beside(n): t for n, t in to_tensors(client.layout).items()}
        # the weights of the mixture are fixed while the local adapter is trained
        both = {**shared, **own, MIX: torch.tensor(0.5)}
        trained = yield Train(both, list(own))
        kept = {n: t for n, t in trained.items() if n.endswith(OTHER)}
        anchors = yield Features(self.parameters.samples)
        return Fitted(self.payload(sent, shared, client.round), {**kept, ANCHORS: anchors})

    def upload(self, state: ServerState, client: int, round_: int, steps: int = 0) -> Upload:
        """Expect the global adapter, after two trainings: of that, and of the local one."""
        return super().upload(state, client, round_, 2 * steps)
