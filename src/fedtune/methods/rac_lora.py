"""RAC-LoRA, federated: each round a fresh random A, B is trained, the product goes into the base (arXiv 2410.08305).

A is frozen and common, so mean(B) A is exact; drawing it anew each round lets the sum leave any one subspace. A is
made from the run's seed and never sent; what a client downloads is the last round's mean B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedtune.methods.base_delta import MovesBase, is_base_side
from fedtune.methods.requests import Tensors
from fedtune.methods.state import ClientUpdate, ServerState, Sizes
from fedtune.names import A

if TYPE_CHECKING:
    from torch import Tensor

    from fedtune.lora.state import AdapterState


class RACLoRA(MovesBase):
    """FFA-LoRA with a fresh A each round, merged into the base."""

    name = "rac_lora"
    title = "RAC-LoRA"
    paper = "arXiv:2410.08305"
    exact = True
    linear = True
    pairs = False
    by_product = True

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """B up, the last product down."""
        return sizes.b, sizes.a + sizes.b

    def trainable(self, round_: int, name: str) -> bool:
        """Train B only."""
        return A not in name and not is_base_side(name)

    def begin(self, layout: AdapterState, download: Tensors, kept: Tensors, round_: int) -> dict[str, Tensor]:
        """Start from this round's A, and B = 0."""
        from fedtune.lora.state import fresh

        return super().begin(fresh(layout, self.seed, round_), download, kept, round_)

    def shared(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send no adapter: each round's is fresh."""
        return {}

    def completed(self, update: ClientUpdate, state: ServerState) -> AdapterState:
        """Return an update as a whole adapter: B under the round's own A."""
        from fedtune.lora.state import fresh, to_tensors, with_tensors

        used = fresh(state.adapter, self.seed, state.round + 1)
        return with_tensors(used, {**to_tensors(used), **update.tensors})

    def server_step(self, updates: Sequence[ClientUpdate], state: ServerState, round_: int) -> ServerState:
        """Move mean(B) A into the base model."""
        from fedtune.lora import product
        from fedtune.lora.state import fresh, to_tensors, with_tensors

        used = fresh(state.adapter, self.seed, round_)
        mean = with_tensors(used, {**to_tensors(used), **self.combine(updates, state)})
        products = {path: product.of(module) for path, module in mean.items()}
        return self.moved(state, fresh(used, self.seed, round_ + 1), products, updates, round_)

    def aggregate(
        self, clients: Sequence[AdapterState], examples: Sequence[float], state: ServerState, round_: int, rank: int = 0
    ) -> ServerState:
        """Average B under the clients' common A, wherever that came from."""
        from fedtune.lora import product
        from fedtune.lora.base_delta import append
        from fedtune.methods.ffa_lora import FFALoRA

        mean = FFALoRA(FFALoRA.Parameters()).aggregate(clients, examples, state, round_)
        moved = append((), round_, {path: product.of(m) for path, m in mean.adapter.items()})
        zero = {path: replace(m, b=m.b * 0) for path, m in mean.adapter.items()}
        return replace(state, adapter=zero, round=round_, base=moved)
