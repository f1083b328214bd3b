"""FFA-LoRA: A is frozen at its common random start, only B is trained and sent (arXiv 2403.12313).

mean(B) A = mean(B A), so the mean is exact. Every client builds the same A from the run's seed; it is never sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.methods.base import DORA, Method
from fedtune.methods.state import ServerState, Sizes
from fedtune.names import A

if TYPE_CHECKING:
    from torch import Tensor


class FFALoRA(Method):
    """Mean of B under a common, frozen A."""

    name = "ffa_lora"
    title = "FFA-LoRA"
    paper = "arXiv:2403.12313"
    guarantee = "exact"
    spaces = DORA
    updates = "product"

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """B both ways."""
        return sizes.b, sizes.b

    def trainable(self, round_: int, name: str) -> bool:
        """Train B only."""
        return A not in name

    def view(self, state: ServerState, client: int) -> dict[str, Tensor]:
        """Send B only; A is what the seed made it."""
        return {name: t for name, t in super().view(state, client).items() if self.trainable(0, name)}
