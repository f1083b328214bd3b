"""RoLoRA: odd rounds train and send B, even rounds A; the other factor is the same everywhere (arXiv 2502.01755).

With one factor common, the mean of the other is exact in every round. The first round must train B: while B is 0, A
has no gradient.
"""

from fedtune.methods.base import Method
from fedtune.methods.state import Sizes
from fedtune.names import A, B


class RoLoRA(Method):
    """Alternating mean of one factor."""

    name = "rolora"
    title = "RoLoRA"
    paper = "arXiv:2502.01755"
    guarantee = "exact"

    @classmethod
    def traffic(cls, sizes: Sizes) -> tuple[float, float]:
        """One factor up, on average half of both; both down, for a client may have missed the last round."""
        return (sizes.a + sizes.b) / 2, sizes.a + sizes.b

    def trainable(self, round_: int, name: str) -> bool:
        """Train B in odd rounds and A in even ones."""
        return (B in name) if round_ % 2 else (A in name)
